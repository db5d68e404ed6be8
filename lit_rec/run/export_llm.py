"""The tuned language model as others load it: a PEFT folder, and merged with all that serving needs."""

import json
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lit_rec.llm.loading import merged
from lit_rec.recipes.loop import Loop
from lit_rec.run.cards import front_matter, write_card
from lit_rec.run.folder import write_atomic
from lit_rec.run.modelfile import chat_parts, modelfile

CONTEXT = 8192  # most tokens an Ollama server is asked to make room for


def llm_card(folder: Path, cfg: DictConfig, facts: dict[str, Any], *, merged: bool, chat: bool = True) -> None:
    """Write the card of the adapter, or of the merged model.

    Args:
        folder: Where README.md goes.
        cfg: The run's configuration.
        facts: What all cards of the run share.
        merged: Which of both.
        chat: Whether the Modelfile has the chat template.
    """
    kind = "merged" if merged else "adapter"
    relation, library = ("finetune", "transformers") if merged else ("adapter", "peft")
    title = f"{cfg.name}: {facts['base']['name']} tuned to describe the tastes of {facts['data']} users"
    front = front_matter(
        facts, f"{cfg.name}-{kind}", library, base_model_relation=relation, pipeline_tag="text-generation"
    )
    write_card(
        folder / "README.md",
        "card_adapter.md.j2",
        front,
        title=title,
        merged=merged,
        chat=chat,
        template=cfg.prompt.template,
        history=cfg.prompt.history,
        sampling=cfg.llm,
        **{k: v for k, v in facts.items() if k not in ("lines", "metrics", "convention", "licence", "row", "data")},
    )


def write_adapter(cfg: DictConfig, source: Path, target: Path, facts: dict[str, Any]) -> None:
    """Copy the adapter with its tokenizer, name the base model as others know it, and write its card."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("README.md"))
    path = target / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = facts["base"]["name"]  # not the path of a cache on this machine
    config["revision"] = (facts["base"]["revision"] or None) if facts["is_hub"] else None
    path.write_text(json.dumps(config, indent=2, sort_keys=True))
    llm_card(target, cfg, facts, merged=False)


def write_merged(cfg: DictConfig, loop: Loop, adapter: Path, target: Path, facts: dict[str, Any]) -> None:
    """Merge the adapter into its base, in the number format the run sampled in, and write all that serving needs."""
    if cfg.llm.quantization is not None:
        facts = facts | {
            "note": f"{facts['note']} Measured on {cfg.llm.quantization} weights; merged into the full ones."
        }
    model, tokenizer = merged(cfg.llm, adapter, loop.ground.cache)
    ends = (tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id)
    stops = sorted({i for end in ends if end is not None for i in (end if isinstance(end, list) else [end])})
    settings = {"do_sample": True, "temperature": cfg.llm.temperature, "top_p": cfg.llm.top_p, "top_k": 0}
    model.generation_config.update(
        **settings,
        max_new_tokens=cfg.llm.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],
    )
    model.generation_config._from_model_config = False  # else a loader may make another one of the model's own
    model.save_pretrained(target, safe_serialization=True)
    tokenizer.save_pretrained(target)

    def render(messages: list[dict[str, str]], asked: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked))

    parts = chat_parts(render, tokenizer.bos_token or "")
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or CONTEXT
    parameters = {
        "temperature": cfg.llm.temperature,
        "top_p": cfg.llm.top_p,
        "top_k": 0,  # Ollama's own 40 and its repetition penalty would be another distribution
        "repeat_penalty": 1.0,
        "num_predict": cfg.llm.max_new_tokens,
        "num_ctx": min(window, CONTEXT),
    }
    words = [str(tokenizer.convert_ids_to_tokens(i)) for i in stops]
    write_atomic(target / "Modelfile", modelfile(parts, system=facts["system"], parameters=parameters, stops=words))
    llm_card(target, cfg, facts, merged=True, chat=parts is not None)
