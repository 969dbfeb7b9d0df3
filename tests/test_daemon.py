"""The daemon, as processes: it serves misses, is alone, ends when told to, loses nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp8gemm import backends, native, planner, store
from fp8gemm.problem import Problem
from fp8gemm.store import Task
from fp8gemm.tuner import daemon
from fp8gemm.tuner.target import CpuTarget
from fp8gemm.tuner.writer import Writer

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FP8GEMM_CACHE_DIR", str(tmp_path))
    return tmp_path


class Socket:
    """What systemd listens on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(60)

    def wait(self, state: str) -> None:
        while not self.socket.recv(4096).decode().startswith(state):
            pass


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Socket]:
    found = Socket(tmp_path / "notify")
    yield found
    found.socket.close()


def start(systemd: Socket | None, *options: str) -> "subprocess.Popen[str]":
    env = os.environ | ({"NOTIFY_SOCKET": str(systemd.path)} if systemd else {})
    command = [sys.executable, "-m", "fp8gemm", "daemon", "run", "--device", "cpu", "--share", "--duty", "1", *options]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def task(m: int, n: int = 64, k: int = 128) -> Task:
    cpu = backends.cpu_device()
    return Task(Problem(native.DENSE, m, n, k), cpu.name, cpu.sms, cpu.sms)


def miss(*tasks: Task) -> None:
    assert store.add_misses(store.path(), {task: 10 - i for i, task in enumerate(tasks)})


def end(process: "subprocess.Popen[str]") -> tuple[str, str]:
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=30)


def test_it_tunes_misses_and_ends() -> None:
    miss(task(16), task(32))
    out, err = start(None, "--once", "--json").communicate(timeout=120)
    assert json.loads(out) == {"exit_code": 0, "tuned": 2, "failed": 0, "reason": "nothing left to tune"}
    assert err.index("tuning 16x64x128") < err.index("tuning 32x64x128"), "the most-called first"
    assert store.rows("misses") == store.rows("leases") == []
    found = native.Problem(native.DENSE, native.CPU, 0, 16, 64, 128, 1, 1, 1, 1)
    plan, from_store = planner.choose(planner.make_key(found))
    assert from_store
    assert json.loads(store.rows("winners")[0]["plan"]) == plan._asdict()  # type: ignore[union-attr]


def test_the_second_one_is_told_who_holds_the_lock(systemd: Socket) -> None:
    first = start(systemd)
    systemd.wait("READY=1")
    out, err = start(None, "--json").communicate(timeout=60)
    assert json.loads(out)["exit_code"] == 4
    assert f":{first.pid} since" in err
    status = daemon.status()
    assert [running["pid"] for running in status["daemons"]] == [first.pid]
    end(first)
    assert first.returncode == 0
    assert daemon.status()["daemons"] == []


def test_sigterm_ends_it_and_loses_no_finished_measurement(systemd: Socket) -> None:
    miss(task(512, 2048, 2048))
    process = start(systemd)
    systemd.wait("STATUS=tuning")
    _, err = end(process)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    for row in store.rows("measurements"):
        assert row["verdict"]
    assert daemon.GRACE < 2
    if not store.rows("winners"):
        assert len(store.rows("misses")) == 1, "it will be tuned by the next one"


def test_a_dead_daemons_lease_is_taken_over() -> None:
    miss(task(16))
    with Writer() as dead:
        assert dead.claim(backends.cpu_device(), seconds=3600) == task(16)
    out, _ = start(None, "--once", "--json").communicate(timeout=60)
    assert json.loads(out)["tuned"] == 0
    with Writer() as later:
        later.connection.execute("UPDATE leases SET expires = 0")
    out, _ = start(None, "--once", "--json").communicate(timeout=120)
    assert json.loads(out)["tuned"] == 1


def test_a_killed_daemon_leaves_no_lock(systemd: Socket) -> None:
    first = start(systemd)
    systemd.wait("READY=1")
    first.kill()
    first.communicate()
    assert daemon.status()["daemons"] == []
    out, _ = start(None, "--once", "--json").communicate(timeout=60)
    assert json.loads(out)["exit_code"] == 0


def test_a_problem_that_fails_is_given_up_and_others_go_on() -> None:
    broken = task(16)._replace(num_sms=0)  # no plan fits no cores
    miss(broken, task(32))
    out, _ = start(None, "--once", "--json").communicate(timeout=120)
    assert json.loads(out) == {"exit_code": 0, "tuned": 1, "failed": 1, "reason": "nothing left to tune"}
    (row,) = store.rows("misses")
    assert row["failure"]
    assert daemon.status()["failed"] == 1


@pytest.mark.parametrize("share", [True, False])
def test_it_waits_for_an_idle_device_unless_it_shares(share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [False, False, True, True]
    monkeypatch.setattr(CpuTarget, "is_idle", lambda _: answers.pop(0))
    monkeypatch.setattr(daemon, "LOOK", 0.0)
    monkeypatch.setattr(daemon._Work, "_rest", lambda *_: None)
    miss(task(16))
    work = daemon._Work("cpu", daemon.Share(None, 1.0) if share else None, True, threading.Event())
    assert work._serve(CpuTarget()) == "nothing left to tune"
    assert work._tuned == 1
    assert len(answers) == (4 if share else 0)


def test_the_unit_runs_this_python() -> None:
    text = daemon.unit("cuda:1", share=True)
    assert f"ExecStart={sys.executable} -m fp8gemm daemon run --device cuda:1 --share" in text
    assert "Type=notify" in text
    assert f"FP8GEMM_CACHE_DIR={os.environ['FP8GEMM_CACHE_DIR']}" in text
    assert "TimeoutStopSec=5" in text


def test_rests_are_long_and_longer_after_a_disturbance(monkeypatch: pytest.MonkeyPatch) -> None:
    work = daemon._Work("cpu", daemon.Share(None, 0.1), True, threading.Event())
    waited: list[float] = []
    monkeypatch.setattr(work.stop, "wait", waited.append)
    work._rest(0.01, False)
    work._rest(0.01, True)
    assert waited == [pytest.approx(0.09), pytest.approx(0.36)]
