"""The language model of a run: the frozen base, one LoRA adapter on it, and answers that are never asked for twice."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_rec import distributed
from lit_rec.errors import UserError
from lit_rec.llm.loading import dtype_name, fingerprint, load_llm, local_source
from lit_rec.llm.lora import (
    LoraLayer,
    PeftLoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from lit_rec.llm.memory import Halving
from lit_rec.llm.prompts import Messages
from lit_rec.llm.sampler import Sampler, SamplingSettings
from lit_rec.llm.sharding import shard_frozen
from lit_rec.llm.store import Answer, AnswerStore, answer_key
from lit_rec.schema import LLMConfig, LoraConfig

T = TypeVar("T")
BASE = "base"  # the adapter name of the untrained model in answer keys


class LanguageModel:
    """One causal language model with one LoRA adapter; weights are loaded when first needed.

    Args:
        cfg: Which model, and how it is sampled.
        lora: The adapter's shape.
        store: Where answers are kept.
        device: "cpu", "cuda:0" ...
        seed: Of the adapter's initial weights and of the sampling.
        sharded: Cut the frozen weights among the processes; all of them then write every answer, in step.
        cache: Where assets are kept.
    """

    def __init__(
        self,
        cfg: LLMConfig,
        lora: LoraConfig,
        store: AnswerStore,
        *,
        device: str,
        seed: int,
        cache: Path | None = None,
        sharded: bool = False,
    ) -> None:
        self.cfg, self.lora, self.store, self.device, self.seed, self.cache = cfg, lora, store, device, seed, cache
        self.sharded = sharded
        self.settings = SamplingSettings(cfg.max_new_tokens, cfg.temperature, cfg.top_p)
        self.adapter = BASE

    @cached_property
    def source(self) -> str:
        """Folder or repository the model loads from."""
        return local_source(self.cfg, "llm", self.cache)

    @property
    def _loads_on(self) -> str:
        return self.device if not self.sharded else "cpu"

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the base weights, without loading them."""
        kind = f"{dtype_name(self.cfg.dtype, self._loads_on)}-{self.cfg.quantization}"
        return f"{fingerprint(self.source, self.cfg.revision)}-{kind}"

    @cached_property
    def _loaded(self) -> tuple[Any, Any, dict[str, Tensor]]:
        base, tokenizer = load_llm(self.cfg, self._loads_on, self.cache)
        targets: Any = self.lora.targets if self.lora.targets == "all-linear" else self.lora.targets.split(",")
        config = PeftLoraConfig(
            r=self.lora.r,
            lora_alpha=self.lora.alpha,
            lora_dropout=self.lora.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.source,
        )
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations between the two libraries, nothing a user could mend
            torch.manual_seed(self.seed)
            try:
                model = get_peft_model(base, config)
            except ValueError as error:
                raise UserError(
                    f"the adapter cannot be put on {self.source}",
                    where="config key policy.lora.targets",
                    why=" ".join(str(error).split())[:300],
                    fix="use all-linear, or names of its layers with commas: 'q_proj,v_proj'",
                ) from error
        if self.sharded:
            shard_frozen(model, self.device)
        elif self.cfg.quantization is None:
            model = model.to(self.device)
        model.eval()
        initial = {name: t.detach().clone() for name, t in get_peft_model_state_dict(model).items()}
        return model, tokenizer, initial

    @property
    def model(self) -> Any:
        """The `PeftModel`: the base with its adapter."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._loaded[1]

    def reset_adapter(self) -> None:
        """Back to the untrained adapter, which changes nothing."""
        self.load_adapter(self._loaded[2])
        self.adapter = BASE

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter's weights, in PEFT's names."""
        return {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(self.model).items()}

    def load_adapter(self, state: dict[str, Tensor]) -> None:
        """Put these weights into the adapter."""
        set_peft_model_state_dict(self.model, state)
        self.mark_adapter()

    @contextmanager
    def wearing(self, folder: Path | None) -> Iterator[None]:
        """The adapter that `save_adapter` left in a folder, or none; afterwards the present one again."""
        kept = None if folder is None else load_file(folder / "adapter_model.safetensors")
        before, wanted = self.adapter, BASE if kept is None else _digest(kept)
        present: dict[str, Tensor] = {}
        if kept is not None and wanted != before:
            present = {name: tensor.clone() for name, tensor in self.adapter_state().items()}
            self.load_adapter(kept)
        self.adapter = wanted  # without one, the model is asked with its adapter off
        try:
            yield
        finally:
            if present:
                self.load_adapter(present)
            self.adapter = before

    def mark_adapter(self) -> None:
        """Name the adapter by its present weights: the name is part of every answer's key."""
        self.adapter = _digest(self.adapter_state())

    def save_adapter(self, folder: Path) -> None:
        """Write a folder that `PeftModel.from_pretrained` reads."""
        self.model.save_pretrained(str(folder), safe_serialization=True)
        self.tokenizer.save_pretrained(str(folder))

    def tokenize(self, messages: Messages) -> list[int]:
        """Token ids of a chat prompt, up to where the answer begins."""
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )

    def stop_ids(self) -> list[int]:
        """Tokens that end an answer: the tokenizer's and the model's own."""
        ids = [self.tokenizer.eos_token_id, self.model.config.eos_token_id]
        ids.append(getattr(self.model.generation_config, "eos_token_id", None))
        flat = [i for group in ids if group is not None for i in (group if isinstance(group, list) else [group])]
        return sorted(set(flat))

    @contextmanager
    def for_sampling(self) -> Iterator[None]:
        """The adapter off (untrained) or merged into the weights (two matrix products less per layer and token).

        Un-merging leaves rounding behind, and a resumed run must see the very same weights: they are set aside and
        put back instead. Weights that are quantised or cut stay as they are.
        """
        if self.adapter == BASE:
            with self.model.disable_adapter():
                yield
            return
        if self.cfg.quantization is not None or self.sharded:
            yield
            return
        layers: list[Any] = [m for m in self.model.modules() if isinstance(m, LoraLayer)]
        weights = [layer.get_base_layer().weight for layer in layers]
        kept = [weight.data.clone() for weight in weights]
        self.model.merge_adapter()
        try:
            yield
        finally:
            self.model.unmerge_adapter()
            for weight, original in zip(weights, kept, strict=True):
                weight.data.copy_(original)

    def check(self) -> None:
        """See that it can be asked; one that is loaded here can be."""

    def answers(
        self,
        prompts: Sequence[Messages],
        counts: Sequence[int],
        *,
        settings: SamplingSettings | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Answer]]:
        """Answers 0..counts[i]-1 to every prompt, from the store where it has them.

        Batches are cut from the whole request, not from what is missing: a run that was killed draws the rest of its
        answers in the same batches as an undisturbed one, equal to the last bit.

        Args:
            prompts: Chat messages.
            counts: Answers wanted per prompt.
            settings: The distribution; default: the configuration's.
            progress: Called with (answers, new tokens) after each batch; new tokens are 0 for stored answers.

        Returns:
            `counts[i]` answers for each prompt.
        """
        settings = settings or self.settings
        shape = {**asdict(settings), "seed": self.seed}

        def keys_of(adapter: str) -> list[list[str]]:
            name = f"{self.fingerprint}/{adapter}"
            return [[answer_key(name, p, shape, j) for j in range(n)] for p, n in zip(prompts, counts, strict=True)]

        keys = keys_of(self.adapter)
        missing = self.store.lacking(k for ks in keys for k in ks)
        if progress is not None:
            progress(sum(counts) - sum(k in missing for ks in keys for k in ks), 0)
        if missing:
            training = self.model.training
            self.model.eval()
            with self.for_sampling():
                drawn = self._draw(prompts, keys, keys_of(BASE), missing, settings, progress)
            self.model.train(training)
            for answers in distributed.gathered(drawn):
                self.store.learn(answers)
        return [[self.store[k] for k in ks] for ks in keys]

    def _draw(
        self,
        prompts: Sequence[Messages],
        keys: list[list[str]],
        chances: list[list[str]],
        missing: set[str],
        settings: SamplingSettings,
        progress: Callable[[int, int], None] | None,
    ) -> dict[str, Answer]:
        """Draw what is missing, batch by batch, longest prompts first (the largest batch fails first).

        Chance goes by `chances`, the keys without the adapter: whatever the training, the same answer is drawn with the
        same luck, so that states differ by what was learnt, and adapters equal but for rounding write the same.
        Of several processes each draws its share of the batches; returns what this one has drawn.
        """
        tokens = [self.tokenize(p) for p in prompts]
        sampler = Sampler(self.model, settings, self.stop_ids())
        sampler.share(tokens)
        order = sorted(range(len(prompts)), key=lambda i: (-len(tokens[i]), chances[i][0]))
        batches = _batches(order, [len(ks) for ks in keys], self.cfg.batch_size)
        lacking, left = {}, set(missing)
        for i in order:  # a prompt that is asked twice is answered where it comes first
            lacking[i] = [j for j, key in enumerate(keys[i]) if key in left]
            left.difference_update(keys[i])
        found: dict[str, Answer] = {}

        def draw(part: Sequence[tuple[int, int]]) -> None:
            """Draw samples j of prompts i, as (i, j) with equal i side by side, and keep them."""
            todo = {i: [j for _, j in pairs] for i, pairs in groupby(part, key=itemgetter(0))}
            seeds = [[_seed(chances[i][j]) for j in js] for i, js in todo.items()]
            drawn = sampler.sample([tokens[i] for i in todo], seeds)
            ids = [one for answers in drawn for one in answers]
            new = {keys[i][j]: self._answer(one, sampler.stop) for (i, j), one in zip(part, ids, strict=True)}
            self.keep(new)
            found.update(new)
            if progress is not None:
                progress(len(new), sum(answer.tokens for answer in new.values()))

        # Where the model is cut, all processes have to stay in step: none can take a smaller batch of its own accord.
        halving = None if self.sharded else Halving("answers", "llm.batch_size")
        for todo in self.share([todo for batch in batches if (todo := [i for i in batch if lacking[i]])]):
            batch = [(i, j) for i in todo for j in lacking[i]]
            halving(draw, batch) if halving else draw(batch)
        return found

    def share(self, batches: Sequence[T]) -> Sequence[T]:
        """The batches that are this process's to run through the model: a share, or all where the model is cut."""
        return batches if self.sharded else distributed.share(batches)

    def keep(self, answers: Mapping[str, Answer]) -> None:
        """Put what this process has computed on disk; where the model is cut all have, and process 0 does."""
        if not self.sharded or distributed.main():
            self.store.add(answers.items())

    def _answer(self, ids: list[int], stop: Tensor) -> Answer:
        ended = bool(ids) and ids[-1] in stop.tolist()
        text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True).strip()
        return Answer(text=text, tokens=len(ids), finish="stop" if ended else "length")

    def reference(self, kind: str) -> Any:
        """Context in which the model is the reference policy: adapter off for "base", as it is for "previous"."""
        return self.model.disable_adapter() if kind == "base" else nullcontext()


def _digest(state: Mapping[str, Tensor]) -> str:
    """Name of an adapter by its weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()[:16]


def _seed(key: str) -> int:
    return int(hashlib.sha256(key.encode()).hexdigest()[:12], 16)


def _batches(order: Sequence[int], counts: Sequence[int], size: int) -> Iterator[list[int]]:
    """Consecutive prompts whose answers fill at most `size` rows; one prompt is never split."""
    batch: list[int] = []
    rows = 0
    for i in order:
        if batch and rows + counts[i] > size:
            yield batch
            batch, rows = [], 0
        batch.append(i)
        rows += counts[i]
    if batch:
        yield batch
