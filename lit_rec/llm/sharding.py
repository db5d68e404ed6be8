"""A frozen model too large for one device: every process holds a part of each layer, and borrows the rest in passing.

Only what is frozen is cut (FSDP, `torch.distributed.fsdp.fully_shard`); adapters stay whole everywhere, so they train
by DDP, save and load as on one device. All processes must run the same forward passes in the same order.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lit_rec.errors import UserError


def shard_frozen(model: nn.Module, device: str) -> None:
    """Cut the frozen weights of every layer among the processes, and move the model to this process's device.

    Args:
        model: A PEFT model on the CPU; what requires gradients stays whole, and so do embeddings and head.
        device: "cpu", "cuda:0" ...

    Raises:
        UserError: It is not known what a layer of this model is.
    """
    names = {*(getattr(_base(model), "_no_split_modules", None) or ())}
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(
            f"{type(_base(model)).__name__} does not say what its layers are, so it cannot be cut",
            where="config key trainer.strategy",
            fix="use trainer.strategy=ddp, with llm.quantization=nf4 where memory is short",
        )
    mesh = init_device_mesh(device.partition(":")[0], (dist.get_world_size(),))
    whole = {p for p in model.parameters() if p.requires_grad}
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        layer.to(device)  # one layer is whole here at a time
    model.to(device)
    with torch.no_grad():  # what layers are gathered into is made in the first pass, and must not be inference tensors
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device))


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
