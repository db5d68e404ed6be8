"""The policy as a LightningModule: preference optimisation of a LoRA adapter."""

from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from lit_rec import distributed
from lit_rec.llm.language_model import LanguageModel
from lit_rec.llm.lora import get_peft_model_state_dict
from lit_rec.policy.losses import preference_loss
from lit_rec.policy.sequences import answer_logps
from lit_rec.schema import PolicyConfig


class DPOPolicy(L.LightningModule):
    """Trains the adapter of a language model on preference pairs (DPO, arXiv 2305.18290; RLRF4Rec section 1.1).

    One fit covers all rounds. The learning-rate schedule starts again with every round, and so do the optimiser's
    moments unless `keep_optimizer`: the paper trains each round on its own.

    Logged per epoch under `policy/`: loss, chosen_reward, rejected_reward, margin, accuracy (share of pairs with a
    positive margin), chosen_logps, rejected_logps; and per update the learning rate.

    Args:
        llm: The language model; only its adapter is trained and saved.
        cfg: Loss, optimiser and schedule.
    """

    strict_loading = False

    def __init__(self, llm: LanguageModel, cfg: PolicyConfig) -> None:
        super().__init__()
        self.llm, self.cfg = llm, cfg
        self.model = llm.model
        if cfg.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        # What is frozen is alike everywhere: DDP need not send a language model around to see to it.
        self._ddp_params_and_buffers_to_ignore = [n for n, p in self.named_parameters() if not p.requires_grad]
        self.updates_per_round = 1  # set by the data of each round
        self.round_started_at = 0  # global step at which the present round began
        self.epoch_means: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The weighted loss of one batch of pairs; an update's batches add up to the mean over its pairs."""
        logps = answer_logps(self.model, batch)
        tokens = batch["target_mask"].sum(-1)
        losses, chosen, rejected = preference_loss(
            logps[:, 0],
            logps[:, 1],
            batch["ref_logps"][:, 0],
            batch["ref_logps"][:, 1],
            chosen_tokens=tokens[:, 0],
            rejected_tokens=tokens[:, 1],
            loss=self.cfg.loss,
            beta=self.cfg.beta,
            label_smoothing=self.cfg.label_smoothing,
        )
        self._count(losses.detach(), chosen, rejected, logps.detach(), batch["weight"] > 0)
        return losses.sum() * batch["weight"]

    def _count(self, losses: Tensor, chosen: Tensor, rejected: Tensor, logps: Tensor, counts: Tensor) -> None:
        """Add to the epoch's sums; `counts` is false for pairs that another process has counted."""
        new = {
            "loss": losses,
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "margin": chosen - rejected,
            "accuracy": (chosen > rejected).float(),
            "chosen_logps": logps[:, 0],
            "rejected_logps": logps[:, 1],
            "pairs": torch.ones_like(losses),
        }
        for name, values in new.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=values.device)) + counts * values.sum()

    def on_train_epoch_start(self) -> None:
        """Forget the last epoch's sums; a new round begins with a fresh optimiser.

        A model that was loaded to go on from a checkpoint is in evaluation mode: without dropout and gradient
        checkpointing.
        """
        self._sums = {}
        self.train()
        if self.current_epoch % self.cfg.epochs == 0:
            self.round_started_at = self.trainer.global_step
            if not self.cfg.keep_optimizer:
                self.trainer.optimizers[0].state.clear()

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Let dropout go by the batch, not by what this process has drawn before: resumed, it drops the same."""
        place = [self.llm.seed, self.current_epoch, batch_idx, self.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))

    def on_train_epoch_end(self) -> None:
        """Log the epoch's means over pairs."""
        self.epoch_means = self.means()
        self.log_dict({f"policy/{name}": value for name, value in self.epoch_means.items()})

    def means(self) -> dict[str, float]:
        """Means over the pairs of the epoch so far, those of all processes."""
        sums = distributed.total({name: float(value) for name, value in self._sums.items()})
        pairs = max(sums.pop("pairs", 0.0), 1.0)
        return {name: value / pairs for name, value in sums.items()}

    def _learning_rate(self) -> float:
        """Warm-up, then linear decay to zero (or constant), over the updates of a round."""
        done = self.trainer.global_step - self.round_started_at
        warm = self.cfg.warmup * self.updates_per_round
        if done < warm:
            return self.cfg.lr * (done + 1) / (warm + 1)
        if self.cfg.schedule == "constant":
            return self.cfg.lr
        return self.cfg.lr * max(0.0, (self.updates_per_round - done) / max(self.updates_per_round - warm, 1))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate of this update."""
        lr = self._learning_rate()
        for group in optimizer.param_groups:
            group["lr"] = lr
        self.log("policy/lr", lr)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on the adapter."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.cfg.lr, weight_decay=self.cfg.weight_decay)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapter alone: a checkpoint holds what trains."""
        return get_peft_model_state_dict(self.model)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Put an adapter back; never wraps the model again."""
        self.llm.load_adapter(dict(state_dict))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Plain values only, so that the checkpoint loads with weights_only=True."""
        checkpoint["round_started_at"] = self.round_started_at
        checkpoint["epoch_means"] = self.epoch_means

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore where the round began and how the last epoch went."""
        self.round_started_at = checkpoint["round_started_at"]
        self.epoch_means = checkpoint["epoch_means"]
