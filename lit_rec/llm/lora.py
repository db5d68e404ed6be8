"""What is used of peft. Nothing is compiled here, and it is imported without the two seconds that would take.

peft imports bitsandbytes where it is installed, which decorates functions with `torch.compile`: for that alone torch's
compiler would be loaded at every start.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH = "TORCHDYNAMO_DISABLE"  # of torch: its decorators do nothing meanwhile


@contextmanager
def _uncompiled() -> Iterator[None]:
    before = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SWITCH]
        else:
            os.environ[SWITCH] = before


with _uncompiled():
    from peft import LoraConfig as PeftLoraConfig
    from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

__all__ = [
    "LoraLayer",
    "PeftLoraConfig",
    "PeftModel",
    "get_peft_model",
    "get_peft_model_state_dict",
    "set_peft_model_state_dict",
]
