"""Several processes of one run on this machine: started together, watched, and ended together."""

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_rec import cores
from lit_rec.errors import UserError
from lit_rec.run.children import PAUSE, Child, stop_children

BOTH = 5.0  # seconds for others to end too: one mistake of the user's ends all of them
MENDABLE = 2  # the exit code of what the user can mend


def launch(arguments: Sequence[str], folder: Path, count: int, env: Mapping[str, str] = os.environ) -> int:
    """Run the same command in several processes, as torchrun does; the first one has the terminal.

    Args:
        arguments: Of `python -m lit_rec`.
        folder: The run folder; what processes 1, 2, ... say goes to `processes/1/log.txt` there.
        count: Processes.
        env: The environment they get, with their places in it.

    Returns:
        0, or the exit code of the first process where it ended for a reason of its own.

    Raises:
        UserError: A process died; the others have been stopped.
        KeyboardInterrupt: By Ctrl-C or a scheduler; all processes have been stopped before.
    """
    command = [sys.executable, "-m", "lit_rec", *arguments]
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": env.get("OMP_NUM_THREADS", str(max(1, cores.usable() // count))),
    }
    children = [Child(f"process {n}", folder / "processes" / str(n), command) for n in range(count)]
    try:
        for n, child in enumerate(children):
            child.start(env={**env, **shared, "RANK": str(n), "LOCAL_RANK": str(n)}, shown=n == 0)
        while not any(child.code for child in children) and any(child.code is None for child in children):
            time.sleep(PAUSE)
            for child in children:
                child.look()
        failed = [child for child in children if child.code]
        if failed:
            _wait_a_little(children)
    finally:
        stop_children(children)
    if not failed:
        return 0
    killed = [child for child in children if (child.code or 0) < 0]
    first = children[0]
    if not killed and first.code and (failed[0] is first or first.code == MENDABLE):  # it has said why itself
        return first.code
    raise _died((killed or failed)[0])


def devices_here(devices: int) -> int:
    """Processes that `trainer.devices` means: -1 is one for each GPU, and one where there is none."""
    if devices != -1:
        return devices
    import torch

    return max(1, torch.cuda.device_count())


def _wait_a_little(children: Sequence[Child]) -> None:
    """What is wrong for all of them the first process tells; who was killed is seen to end a moment later."""
    limit = time.monotonic() + BOTH
    while time.monotonic() < limit and any(child.code is None for child in children):
        time.sleep(PAUSE)
        for child in children:
            child.look()


def _died(child: Child) -> UserError:
    code = child.code or 0
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    said = "\n".join(child.last_lines()) if child.log.is_file() else ""
    return UserError(
        f"{child.name} of the run ended ({how}), so the others were stopped",
        where=str(child.log) if said else f"{child.name}, which has the terminal",
        why=said or ("it was killed, by the system where memory ran out" if code == -9 else ""),
        fix="mend what it says and start the same command again: it goes on where the run was",
    )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
