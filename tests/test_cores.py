"""Whether threads spin or sleep while they wait: seen from what else is at work, and left to the user."""

import os
import subprocess
import sys
import time

import pytest

from lit_rec import cli, cores


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of a shell that has said nothing about threads."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    monkeypatch.setattr(os, "environ", kept)
    return kept


def test_cores_that_others_work_on_are_not_free() -> None:
    burn = [sys.executable, "-c", "while True: pass"]
    burners = [subprocess.Popen(burn) for _ in range(2 * cores.usable())]
    try:
        time.sleep(0.5)
        assert not cores.free(max(2, cores.usable()))
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def test_threads_that_get_all_the_time_there_is_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "thread_time", time.perf_counter)
    assert cores.free(2)


@pytest.mark.parametrize("looks", range(1, cores.LOOKS + 2))
def test_who_is_gone_a_moment_later_does_not_count(looks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(cores, "_free_now", lambda count: asked.append(count) or len(asked) == looks)
    assert cores.free(2) == (looks <= cores.LOOKS)
    assert len(asked) == min(looks, cores.LOOKS)


@pytest.mark.parametrize("free", [True, False])
def test_threads_sleep_where_another_process_is_at_work(
    free: bool, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(cores, "free", lambda count: asked.append(count) or free)
    cli.prepare(3)
    assert asked == [3]
    assert environment.get("OMP_WAIT_POLICY") == (None if free else "passive")


@pytest.mark.parametrize(
    ("threads", "said"),
    [(1, {}), (None, {"OMP_NUM_THREADS": "1"}), (2, {"OMP_WAIT_POLICY": "active"}), (2, {"GOMP_SPINCOUNT": "9"})],
)
def test_one_thread_waits_for_none_and_what_the_user_says_stays(
    threads: int | None, said: dict[str, str], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "free", lambda count: False)
    environment |= said
    cli.prepare(threads)
    assert environment.get("OMP_WAIT_POLICY") == said.get("OMP_WAIT_POLICY")


def test_nested_numbers_of_threads_are_read(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(cores, "free", lambda count: asked.append(count) or True)
    environment["OMP_NUM_THREADS"] = "4,2"
    cli.prepare(None)
    assert asked == [4]
