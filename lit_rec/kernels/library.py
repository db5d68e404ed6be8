"""Compile the kernels, once, where there is a C compiler."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

import torch

SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-shared", "-fPIC")
PROCESSOR = {"AVX512": ("-march=x86-64-v4",), "AVX2": ("-march=x86-64-v3",)}  # as torch calls what it has
AMD = "AuthenticAMD"
MOST_LAYERS = 16
SIZE, COUNT, NUMBERS = ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p


class Layers(ctypes.Structure):
    """Of lists, and of the layers that read them, as context.c has them."""

    _fields_ = [
        *((name, SIZE) for name in ("candidates", "width", "heads", "layers")),
        ("widths", SIZE * (MOST_LAYERS + 1)),
        *((name, NUMBERS) for name in ("w_in", "b_in", "w_read", "b_read")),
        *((name, NUMBERS * (MOST_LAYERS + 1)) for name in ("weights", "biases")),
    ]


class Norm(ctypes.Structure):
    """A batch normalisation, as dlcm.c has it."""

    _fields_ = [
        *((name, NUMBERS) for name in ("scale", "shift", "mean", "var")),
        *((name, ctypes.c_float) for name in ("momentum", "eps")),
    ]


class Dlcm(ctypes.Structure):
    """DLCM and its lists, as dlcm.c has them."""

    _fields_ = [
        *((name, SIZE) for name in ("candidates", "width", "hidden")),
        *((name, NUMBERS) for name in ("w_input", "b_input", "w_state", "b_state")),
        *((name, NUMBERS) for name in ("w_final", "b_final", "w_score", "b_score")),
        *((name, Norm) for name in ("final", "state")),
    ]


class Named(ctypes.Structure):
    """Items and their attributes' values, as embed.c has them."""

    _fields_ = [
        *((name, SIZE) for name in ("places", "dim", "columns", "bags", "item_rows", "value_rows")),
        *((name, NUMBERS) for name in ("items", "values")),
        ("ends", ctypes.POINTER(ctypes.c_int64)),
    ]


class Stack(ctypes.Structure):
    """Experts, as experts.c has them."""

    _fields_ = [
        *((name, SIZE) for name in ("count", "row")),
        *((name, NUMBERS) for name in ("w1", "b1", "w2", "b2")),
    ]


class Experts(ctypes.Structure):
    """Two stacks of experts with their gate, and what they read, as experts.c has them."""

    _fields_ = [
        *((name, SIZE) for name in ("n", "width", "hidden", "out")),
        *((name, NUMBERS) for name in ("gate_w", "gate_b")),
        ("stacks", Stack * 2),
    ]


@functools.cache
def maker() -> str:
    """Who made the processor, as it calls itself; "" where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    return ""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where no compiler makes them, or the environment says LIT_REC_KERNELS=0."""
    names = [os.environ.get("CC", "cc"), "gcc", "clang"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None or os.name != "posix" or os.environ.get("LIT_REC_KERNELS") == "0":
        return None
    command = [compiler, *FLAGS, *PROCESSOR.get(torch.backends.cpu.get_cpu_capability(), ())]
    for more in (["-fopenmp"], []):  # which shares torch's threads
        if made := _compiled([*command, *more]):
            with suppress(OSError):  # such as from a disk that nothing may be run from
                return _declared(ctypes.CDLL(str(made)))
    return None


def _compiled(command: list[str]) -> Path | None:
    """The library that a command makes, kept for the next time; None where it cannot."""
    text = b"".join(source.read_bytes() for source in SOURCES)
    name = hashlib.sha256(text + repr(command).encode()).hexdigest()[:20]
    folder = _folder()
    made, begun = folder / f"{name}.so", folder / f"{name}.{uuid.uuid4().hex}"
    if not made.exists():
        try:
            sources = [str(source) for source in SOURCES if source.suffix == ".c"]
            subprocess.run([*command, *sources, "-o", str(begun)], check=True, capture_output=True, timeout=120)
            begun.replace(made)
        except (OSError, subprocess.SubprocessError):
            begun.unlink(missing_ok=True)
            return None
    return made


def _folder() -> Path:
    """Where compiled kernels are kept: they run as the user does, so nobody else may write there."""
    with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
        folder = Path.home() / ".cache" / "lit_rec" / "kernels"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        about = folder.stat()
        if about.st_uid == os.getuid() and not about.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    return Path(_for_this_process().name)


@functools.cache
def _for_this_process() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lit_rec_")


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of its functions' arguments and results."""
    layers, named, experts, dlcm = map(ctypes.POINTER, (Layers, Named, Experts, Dlcm))
    for name, result, arguments in (
        ("lanes", COUNT, []),
        ("tall", COUNT, []),
        ("dense_packed", SIZE, [SIZE] * 2),
        ("dense_pack", None, [SIZE] * 2 + [NUMBERS] * 2),
        ("dense", None, [SIZE] * 3 + [COUNT] + [NUMBERS] * 3 + [COUNT, NUMBERS]),
        ("embed_forward", COUNT, [named, COUNT] + [NUMBERS] * 3),
        ("embed_backward", None, [named, COUNT] + [NUMBERS] * 3),
        ("attention_scratch", SIZE, [SIZE] * 2),
        ("attention", None, [SIZE] * 4 + [COUNT] * 2 + [ctypes.c_float] + [NUMBERS] * 6),
        ("experts_kept", SIZE, [experts] + [COUNT] * 2),
        ("experts_scratch", SIZE, [experts]),
        ("experts_sums", SIZE, [experts]),
        ("experts_forward", None, [experts, COUNT] + [NUMBERS] * 2 + [COUNT] + [NUMBERS] * 2),
        ("experts_backward", None, [experts, COUNT] + [NUMBERS] * 5),
        ("gru_kept", SIZE, [SIZE] * 2),
        ("gru_scratch", SIZE, [SIZE] * 3),
        ("gru_forward", None, [SIZE] * 5 + [COUNT] + [NUMBERS] * 6 + [COUNT] + [NUMBERS] * 2),
        ("gru_backward", None, [SIZE] * 5 + [COUNT] + [NUMBERS] * 8),
        ("dlcm_ready", SIZE, [dlcm]),
        ("dlcm_kept", SIZE, [dlcm]),
        ("dlcm_scratch", SIZE, [SIZE, dlcm]),
        ("dlcm_forward", COUNT, [dlcm] + [SIZE] * 2 + [COUNT] + [NUMBERS] * 4 + [COUNT] * 2 + [NUMBERS] * 2),
        ("dlcm_backward", None, [dlcm] + [SIZE] * 2 + [COUNT] + [NUMBERS] * 8),
        ("lengths_of", COUNT, [SIZE] * 2 + [NUMBERS] * 2),
        ("context_ready", SIZE, [layers]),
        ("context_kept", SIZE, [layers]),
        ("context_scratch", SIZE, [SIZE, layers]),
        ("context_sums", SIZE, [layers]),
        ("context_forward", None, [layers] + [SIZE] * 2 + [COUNT] + [NUMBERS] * 4 + [COUNT] + [NUMBERS] * 2),
        ("context_backward", None, [layers] + [SIZE] * 2 + [COUNT] + [NUMBERS] * 9),
        ("context_bce", ctypes.c_float, [layers] + [SIZE] * 2 + [COUNT] + [NUMBERS] * 9),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found
