"""Linear layers of a frozen model on a CPU with bfloat16, as its matrix unit wants them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_rec.llm.loading import native_bf16

ROWS = 2000  # for which oneDNN chooses the layout; it computes other numbers of rows as well


class PackedLinear(nn.Module):
    """A linear layer whose weights lie in oneDNN's blocks already, with the GELU behind it where there is one.

    `nn.Linear` has them rearranged at every call, which takes an eighth of an encoder's time. The operators are those
    that `torch.compile` puts in the place of a frozen linear layer.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.then, self.exactly = ("gelu", "none") if gelu else ("none", "")

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.then, [], self.exactly)


def pack(model: nn.Module) -> nn.Module:
    """Pack the linear layers of a frozen model in place, where that is faster: in bfloat16 on a CPU."""
    for name, child in model.named_children():
        if type(child) is not nn.Linear:
            pack(child)
        elif child.weight.dtype is torch.bfloat16 and child.weight.is_cpu and native_bf16("cpu"):
            behind = getattr(model, "intermediate_act_fn", None) if name == "dense" else None  # as BERT names them
            gelu = getattr(behind, "act", None) is F.gelu
            setattr(model, name, PackedLinear(child, gelu))
            if gelu:
                model.intermediate_act_fn = nn.Identity()
    return model
