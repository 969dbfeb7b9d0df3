"""Running processes follow the store: plans reach them, misses leave them, nothing waits."""

import atexit
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import fp8gemm
from fp8gemm import backends, live, native, planner, store
from fp8gemm.backends import CpuPlan
from fp8gemm.errors import CompileError
from fp8gemm.problem import Problem
from fp8gemm.store import Task
from fp8gemm.tuner.writer import Stamp, Winner, Writer

ROOT = Path(__file__).parent.parent
SIZES = 40, 256, 512  # M (of bucket 48), N, K
PROBLEM = Problem(native.DENSE, 48, 256, 512)


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty table and store, a follower of our own, and no thread."""
    monkeypatch.setenv("FP8GEMM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(planner, "follow", lambda: None)
    monkeypatch.setattr(live, "_follower", live._Follower())
    planner.forget()
    planner.listing()
    yield
    planner.forget()


def call(m: int = SIZES[0], times: int = 1) -> bytes:
    rng = np.random.default_rng(0)
    _, n, k = SIZES
    a, b = (rng.integers(0, 0x7F, (rows, k), np.uint8) for rows in (m, n))
    sa, sb = (np.ones((rows, k // 128), np.float32) for rows in (m, n // 128))
    for _ in range(times):
        d = fp8gemm.gemm_fp8_fp8_bf16_nt((a, sa), (b, sb))
    return bytes(d.numpy())


def task() -> Task:
    cpu = backends.cpu_device()
    return Task(PROBLEM, cpu.name, cpu.sms, cpu.sms)


def publish(plan: CpuPlan) -> None:
    with Writer() as writer:
        winner = Winner(plan, 1e-3, 0.0, plan, 1e-3)
        writer.publish(task(), store.space(backends.cpu_device()), winner, Stamp("", "", ""))


def in_use() -> object:
    (key,) = [listed.key for listed in planner.listing() if listed.key.n == SIZES[1]]
    return planner.current(key)


def test_a_new_plan_of_the_same_reduction_is_adopted() -> None:
    before = call()
    publish(CpuPlan(1, 48))
    assert in_use() != CpuPlan(1, 48)
    assert live._follower.turn() == 1
    assert in_use() == CpuPlan(1, 48)
    assert call() == before
    assert live._follower.turn() == 0


def test_another_reduction_waits_for_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    call()
    old = in_use()
    publish(CpuPlan(1, 48))
    monkeypatch.setattr(CpuPlan, "reduction", property(lambda plan: f"{plan.tile_n} at a time"))
    assert live._follower.turn() == 0
    assert in_use() == old
    assert fp8gemm.refresh() == 1
    assert in_use() == CpuPlan(1, 48)


def test_a_new_process_takes_any_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuPlan, "reduction", property(lambda plan: f"{plan.tile_n} at a time"))
    publish(CpuPlan(1, 48))
    call()
    assert in_use() == CpuPlan(1, 48)


def test_a_plan_that_cannot_be_loaded_now_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    call()
    old = in_use()
    publish(CpuPlan(1, 48))
    original = planner.entry_of

    def fails(*_: object) -> native.Entry:
        raise CompileError("no compiler")

    os.utime(store.path(), ns=(0, 10**18))  # long ago: it is not read again without need
    monkeypatch.setattr(planner, "entry_of", fails)
    assert live._follower.turn() == 0
    assert in_use() == old
    monkeypatch.setattr(planner, "entry_of", original)
    assert live._follower.turn() == 0, "not at once: a build that fails takes time"
    monkeypatch.setattr(time, "monotonic", lambda: math.inf)
    assert live._follower.turn() == 1
    assert in_use() == CpuPlan(1, 48)


def test_a_stored_plan_that_does_not_compile_gives_way_to_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    original = planner.entry_of

    def fails(key: native.Key, plan: CpuPlan, *rest: object) -> native.Entry:
        if plan == CpuPlan(1, 48):
            raise CompileError("registers spill")
        return original(key, plan, *rest)  # type: ignore[arg-type]

    publish(CpuPlan(1, 48))
    monkeypatch.setattr(planner, "entry_of", fails)
    call()
    cpu = backends.cpu_device()
    assert in_use() == planner.default_plan(PROBLEM, cpu, cpu.sms)


def misses() -> dict[int, int]:
    return {row["m"]: row["calls"] for row in store.rows("misses")}


def test_misses_are_counted_and_written() -> None:
    call(times=3)
    live._follower.turn()
    assert misses() == {48: 3}
    call(times=2)
    live._follower.turn()
    assert misses() == {48: 3}, "counts alone are not worth a write each time"
    call(3)
    live._follower.turn()
    assert misses() == {8: 1, 48: 5}, "a new problem is"
    call(times=4)
    live._follower.turn(flush=True)
    assert misses() == {8: 1, 48: 9}


def test_what_the_store_serves_is_no_miss() -> None:
    publish(CpuPlan(1, 48))
    call(times=5)
    live._follower.turn(flush=True)
    assert misses() == {}
    call(3)
    live._follower.turn(flush=True)
    assert misses() == {8: 1}


def test_a_plan_that_may_not_be_taken_yet_is_no_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the daemon would measure it for ever."""
    call()
    publish(CpuPlan(1, 48))
    monkeypatch.setattr(CpuPlan, "reduction", property(lambda plan: f"{plan.tile_n} at a time"))
    call(times=5)
    live._follower.turn(flush=True)
    assert misses() == {}


def test_an_adopted_plan_ends_the_misses() -> None:
    call(times=2)
    live._follower.turn()
    publish(CpuPlan(1, 48))
    live._follower.turn()
    call(times=50)
    live._follower.turn(flush=True)
    assert misses() == {}


def test_a_locked_store_drops_nothing_and_stops_nobody() -> None:
    call()
    live._follower.turn()
    with Writer() as writer:
        writer.connection.execute("BEGIN EXCLUSIVE")
        call(3, times=4)
        live._follower.turn(flush=True)
        writer.connection.execute("ROLLBACK")
    assert misses() == {48: 1}
    live._follower.turn(flush=True)
    assert misses() == {8: 4, 48: 1}


def test_an_entry_that_was_only_prepared_is_no_miss() -> None:
    found = native.Problem(native.DENSE, native.CPU, 0, *SIZES, 1, 1, 1, 1)
    key = planner.make_key(found)
    planner.publish(key, *planner.choose(key))
    live._follower.turn(flush=True)
    assert misses() == {}


PROCESS = """
import json, sys, time
import numpy as np, fp8gemm
from fp8gemm import planner
m, n, k = {sizes}
operands = [(np.zeros((rows, k), np.uint8), np.ones((scales, k // 128), np.float32))
            for rows, scales in ((m, m), (n, n // 128))]
plan = None
while True:
    fp8gemm.gemm_fp8_fp8_bf16_nt(*operands)
    (now,) = planner._current.values()
    if now != plan:
        plan = now
        print(json.dumps([list(plan), time.time()]), flush=True)
    {step}
"""


def start(step: str) -> "subprocess.Popen[str]":
    code = PROCESS.format(sizes=SIZES, step=step)
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_running_process_gets_a_tuned_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """Its own thread does it, and the next process begins with it. How long it took is told, not judged."""
    process = start("time.sleep(0.01)")
    try:
        assert process.stdout is not None
        json.loads(process.stdout.readline())
        deadline = time.monotonic() + 30
        while not misses() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert list(misses()) == [48], "the tuner hears of it"
        publish(CpuPlan(1, 48))
        published = time.time()
        plan, when = json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
    assert plan == [1, 48]
    with capsys.disabled():
        print(f"\nin use {when - published:.2f} s after it was published ", end="")
    with start("break") as later:
        assert later.stdout is not None
        assert json.loads(later.stdout.readline())[0] == [1, 48]


def test_a_short_process_leaves_its_misses(tmp_path: Path) -> None:
    with start("break") as process:
        assert process.stdout is not None
        process.stdout.read()
    assert misses() == {48: 1}


@pytest.mark.parametrize("place", ["file", "file/under"])
def test_without_a_place_for_a_store_calls_go_on(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FP8GEMM_CACHE_DIR", str(tmp_path / place))
    with start("break") as process:
        assert process.stdout is not None
        assert process.stdout.read()
    assert process.returncode == 0


def test_a_fork_has_no_thread() -> None:
    code = """
import os, threading, time, warnings
import numpy as np, fp8gemm
warnings.simplefilter("ignore", DeprecationWarning)
def call():
    fp8gemm.gemm_fp8_fp8_bf16_nt(*[(np.zeros((3, 16), np.uint8), np.ones((r, 1), np.float32)) for r in (3, 1)])
def names():
    return [thread.name for thread in threading.enumerate()]
call()
assert "fp8gemm store" in names()
if not (child := os.fork()):
    call()
    os._exit("fp8gemm store" in names())
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_one_thread_whatever_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.setattr(live, "_thread", None)
    monkeypatch.setattr(os, "register_at_fork", lambda **_: None)
    monkeypatch.setattr(atexit, "register", lambda *_: None)
    monkeypatch.setattr(live, "_run", lambda: started.append(""))
    callers = [threading.Thread(target=live.watch) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert live._thread is not None
    live._thread.join()
    assert len(started) == 1
