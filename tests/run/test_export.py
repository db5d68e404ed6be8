"""What `export` writes, read back with the other side's own loaders."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lit_rec.cli import main
from lit_rec.data.atomic import AtomicFiles
from lit_rec.run import export, export_reranker
from lit_rec.run.cards import base_model, licence
from tests.worlds import BARE, TITLES, World, assert_told, make_world

IDS = torch.tensor([[5, 9, 11, 7, 30, 4]])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = make_world(tmp_path_factory.mktemp("world"))
    assert main(["fit", "--config", made.config, *BARE, "evaluation.controls.history_only=true"]) == 0
    return made


@pytest.fixture(scope="module")
def out(world: World) -> Path:
    target = world.root / "out"
    assert main(command(world, target, "--merged")) == 0
    return target


def command(world: World, target: Path, *more: str) -> list[str]:
    line = ["export", "--config", world.config, *BARE, "evaluation.controls.history_only=true"]
    return [*line, "--output", str(target), *more]


def card(path: Path) -> tuple[dict[str, Any], str]:
    text = path.read_text()
    head = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL)
    assert head
    return yaml.safe_load(head[1]), head[2]


def snippet(path: Path) -> str:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)[0]


def policy_logits(world: World) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(world.root / "llm", dtype=torch.float32)
    plain = base(IDS).logits
    tuned = PeftModel.from_pretrained(base, world.run / "adapter").eval()(IDS).logits
    assert (tuned - plain).abs().max() > 1e-3  # else any file would pass
    return tuned


class TestLanguageModel:
    def test_adapter(self, world: World, out: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(world.root / "llm", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, out / "adapter").eval()
        assert torch.equal(model(IDS).logits, policy_logits(world))
        messages = [{"role": "system", "content": "movies"}, {"role": "user", "content": "film1"}]
        mine, theirs = (AutoTokenizer.from_pretrained(f) for f in (out / "adapter", world.root / "llm"))
        asked = [t.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) for t in (mine, theirs)]
        assert asked[0] == asked[1]
        config = (out / "adapter/adapter_config.json").read_text()
        assert json.loads(config)["base_model_name_or_path"] == "llm"
        assert str(world.root) not in config  # nothing of this machine

    def test_merged(self, world: World, out: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32).eval()
        assert (model(IDS).logits - policy_logits(world)).abs().max() < 1e-4
        assert not any("lora" in name for name in load_file(out / "merged/model.safetensors"))
        how = GenerationConfig.from_pretrained(out / "merged")
        assert (how.do_sample, how.temperature, how.top_p, how.top_k, how.max_new_tokens) == (True, 1.0, 0.95, 0, 6)
        assert how.eos_token_id == [2]
        assert not how._from_model_config

    def test_modelfile(self, out: Path) -> None:
        text = (out / "merged/Modelfile").read_text()
        assert text.startswith("FROM .\n")
        known = dict(re.findall(r"^PARAMETER (\S+) (.*)$", text, re.MULTILINE))
        assert known == {
            "temperature": "1.0",
            "top_p": "0.95",
            "top_k": "0",
            "repeat_penalty": "1.0",
            "num_predict": "6",
            "num_ctx": "512",
            "stop": '"<|im_end|>"',
        }
        system = re.search(r'SYSTEM """(.*?)"""', text, re.DOTALL)
        assert system
        assert system[1].startswith("You know movies well. Say in one or two sentences")

    @pytest.mark.parametrize("part", ["adapter", "merged"])
    def test_cards(self, part: str, world: World, out: Path) -> None:
        front, body = card(out / part / "README.md")
        assert front["library_name"] == {"adapter": "peft", "merged": "transformers"}[part]
        assert front["base_model"] == "llm"
        assert front["base_model_identity"].startswith(re.search(r"identity `(\w{16})", body)[1])  # type: ignore[index]
        assert (front["datasets"], front["language"], front["license"]) == (["tiny"], ["en"], "other")
        metrics = {m["type"]: m for m in front["model-index"][0]["results"][0]["metrics"]}
        wanted = {
            r["metric"]: r
            for r in json.loads((world.run / "results.json").read_text())
            if (r["row"], r["split"], r["unit"], r["convention"]) == ("round_1", "test", "user", "standard")
        }
        assert set(metrics) == {"ndcg@5", "map@5", "mrr@5", "hr@5"}
        for name, metric in metrics.items():
            assert metric["value"] == wanted[name]["mean"]
            assert metric["args"]["ci95"] == wanted[name]["ci95"]
        assert "| history_only |" in body
        assert "beta 0.1" in body
        assert len(re.findall(r"^[123]\. ", body, re.MULTILINE)) == 3
        assert not any(f'"{title}"' in body for title in TITLES)  # nobody's history
        read = ModelCard.load(out / part / "README.md").data  # the hub's own reader
        assert {r.metric_type: r.metric_value for r in read.eval_results}["ndcg@5"] == wanted["ndcg@5"]["mean"]

    @pytest.mark.parametrize("part", ["adapter", "merged"])
    def test_the_cards_own_words_load_it(
        self, part: str, world: World, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(out)
        code = snippet(out / part / "README.md").replace('"folder of the base model"', repr(str(world.root / "llm")))
        found: dict[str, Any] = {}
        exec(code, found)
        assert (found["model"](IDS).logits - policy_logits(world)).abs().max() < 1e-4
        assert found["prompt"]["input_ids"].shape[1] > 5


class TestReranker:
    def test_the_cards_own_words_load_it(
        self, world: World, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Raw ids through the vocabularies give the scores that `predict` gives."""
        monkeypatch.chdir(out)
        found: dict[str, Any] = {}
        exec(snippet(out / "reranker/README.md"), found)
        given, ranked = tmp_path / "given.csv", tmp_path / "ranked.parquet"
        lists = {"u3": ["7", "2", "19", "44", "5"], "u11": ["60", "1", "33", "8", "2"]}
        lines = [f"{user},{item}" for user, shown in lists.items() for item in shown]
        given.write_text("\n".join(["user_id,item_id", *lines]) + "\n")
        line = command(world, ranked)[1:]
        assert main(["predict", *line, "--input", str(given)]) == 0
        scored = {(u, i): s for u, i, s in pl.read_parquet(ranked).select("user_id", "item_id", "score").rows()}
        users = dict(pl.read_parquet("reranker/users.parquet").select("user_id", "row").rows())
        items = dict(pl.read_parquet("reranker/items.parquet").select("item_id", "row").rows())
        batch = {
            "user": torch.tensor([users[user] for user in lists]),
            "items": torch.tensor([[items[item] for item in shown] for shown in lists.values()]),
        }
        with torch.no_grad():
            scores = found["model"](batch)
        wanted = [[scored[user, item] for item in shown] for user, shown in lists.items()]
        assert scores.tolist() == [pytest.approx(row, abs=1e-5) for row in wanted]

    def test_vocabularies(self, world: World, out: Path) -> None:
        folder = out / "reranker"
        data = AtomicFiles(root=str(world.root / "data"), name="tiny", title="title").load()
        items, users = (pl.read_parquet(folder / f"{name}.parquet") for name in ("items", "users"))
        assert items["row"].to_list() == [*range(data.n_items + 1)]
        assert items["title"].to_list() == data.items["title"].to_list()
        assert users["user_id"].to_list() == data.users["user_id"].to_list()
        named = {(a, v): n for a, v, n in pl.read_parquet(folder / "attributes.parquet").rows()}
        table = load_file(folder / "model.safetensors")["data.attributes"]
        for row, genres in enumerate(data.items["genres"].to_list()):
            assert {n for n in table[row].tolist() if n} == {named["genres", g] for g in genres}
        assert json.loads((folder / "config.json").read_text())["row"] == "round_1"

    def test_card(self, out: Path) -> None:
        front, body = card(out / "reranker/README.md")
        assert front["library_name"] == "lit_rec"
        assert front["model-index"][0]["results"][0]["dataset"]["name"] == "tiny"
        assert "onnx" not in body.lower()
        files = set(re.findall(r"`(\w+\.(?:safetensors|json|parquet))`", body))
        assert files | {"README.md"} == {p.name for p in (out / "reranker").iterdir()}


class TestMistakes:
    def test_unfinished(self, world: World, tmp_path: Path, capsys: Any) -> None:
        line = command(world, tmp_path / "x", f"run.dir={tmp_path}/run")
        assert_told(capsys, main(line), "no finished run", "run.dir")
        shutil.copytree(world.run, tmp_path / "run")
        shutil.rmtree(tmp_path / "run/adapter")
        assert_told(capsys, main(line), "not finished", "adapter")
        assert not (tmp_path / "x").exists()

    def test_no_rounds(self, world: World, tmp_path: Path, capsys: Any) -> None:
        assert_told(capsys, main(command(world, tmp_path / "x", "policy.rounds=0")), "no adapter", "policy.rounds")

    @pytest.mark.parametrize("spelling", ["{run}", "{run}/", "{run}/../{name}", "{root}/./{name}"])
    def test_the_run_folder_may_be_written_in_any_way(self, spelling: str, world: World, tmp_path: Path) -> None:
        folder = spelling.format(run=world.run, name=world.run.name, root=world.root)
        assert main(["export", "--run", folder, "--output", str(tmp_path / "out")]) == 0

    def test_another_configuration(self, world: World, tmp_path: Path, capsys: Any) -> None:
        line = command(world, tmp_path / "x", "llm.temperature=0.5")
        assert_told(capsys, main(line), "another configuration", "llm.temperature: 1.0 -> 0.5")

    def test_onnx_not_installed(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        monkeypatch.setattr(export_reranker, "PACKAGES", ("torch", "no_such_package_here"))
        line = command(world, tmp_path / "x", "--onnx")
        assert_told(capsys, main(line), "no_such_package_here not installed", "[export]")
        assert [p.name for p in tmp_path.iterdir()] == []

    def test_a_folder_that_is_not_empty(self, world: World, tmp_path: Path, capsys: Any) -> None:
        target = tmp_path / "x"
        target.mkdir()
        (target / "mine.txt").write_text("mine")
        assert_told(capsys, main(command(world, target)), "not empty", "--overwrite")
        assert_told(capsys, main(command(world, target, "--overwrite")), "no export wrote")
        assert [p.name for p in target.iterdir()] == ["mine.txt"]
        (target / export.MARK).write_text("{}")
        assert main(command(world, target, "--overwrite")) == 0
        assert {p.name for p in target.iterdir()} == {"adapter", "reranker", export.MARK}
        assert [p.name for p in tmp_path.iterdir()] == ["x"]

    def test_the_run_folder_is_safe(self, world: World, capsys: Any) -> None:
        for target in (world.run, world.run / "x", world.root):
            assert_told(capsys, main(command(world, target, "--overwrite")), "overlap")
        assert_told(capsys, main(command(world, world.root / "no" / "x")), "no such folder")
        assert (world.run / "results.json").is_file()

    def test_what_fails_leaves_nothing(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        assert main(command(world, tmp_path / "x")) == 0
        before = (tmp_path / "x/adapter/README.md").read_bytes()

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(export, "write_reranker", full)
        assert_told(capsys, main(command(world, tmp_path / "x", "--overwrite")), "No space left")
        assert_told(capsys, main(command(world, tmp_path / "y")), "No space left")
        assert [p.name for p in tmp_path.iterdir()] == ["x"]
        assert (tmp_path / "x/adapter/README.md").read_bytes() == before


def test_a_model_that_servers_only_sample_is_named_by_its_weights() -> None:
    server = {"model": "alias", "revision": "v2"}
    trained = OmegaConf.create({"hub": "owner/name", "wheel": None, "revision": "main", "server": server})
    assert base_model(trained, "owner/name", "0a1b")["name"] == "owner/name"
    ranked = OmegaConf.create({"hub": None, "wheel": None, "revision": None, "server": server})
    assert base_model(ranked, "", "")["name"] == "alias"


@pytest.mark.parametrize(
    ("kind", "names", "identity", "words"),
    [
        ("models", ["SmolLM2-135M-Instruct.Q4_1", "", "smollm2_135m"], "apache-2.0", "Apache"),
        ("models", ["meta-llama/Llama-3.1-8B-Instruct"], "llama3.1", "Built with Llama"),
        ("models", ["somebody/else"], "other", "not known"),
        ("data", ["ml-100k"], None, "not to be redistributed"),
        ("data", ["mine"], None, "not known"),
    ],
)
def test_licences(kind: str, names: list[str], identity: str | None, words: str) -> None:
    found = licence(kind, *names)
    assert found.get("id") == identity
    assert words in found["note"]
