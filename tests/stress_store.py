"""Run by test_store.py: 16 readers and 4 writers on one store, one of them killed at random 100 times.

Prints a JSON object: what went wrong in readers, and which finished measurements are missing.
"""

import json
import os
import random
import signal
import sqlite3
import sys
import time
import warnings
from pathlib import Path

from fp8gemm import store
from fp8gemm.backends import CpuPlan
from fp8gemm.device import Device
from fp8gemm.problem import Problem
from fp8gemm.store import Task
from fp8gemm.tuner.writer import Measurement, Stamp, Winner, Writer

READERS, WRITERS, PROBLEMS = 16, 4, 8
CPU = Device("a CPU", (0, 0), 8, 0, 0, 0.0, 0.0)
TASKS = [Task(Problem(0, 16 * (i + 1), 256, 512), CPU.name, CPU.sms, CPU.sms) for i in range(PROBLEMS)]
STAMP = Stamp("", "", "x")


def plan_of(problem: int, threads: int) -> CpuPlan:
    """What every reader may find: columns say which problem a plan belongs to."""
    return CpuPlan(threads, 16 * (problem + 1))


def write(name: int, file: Path, log: int) -> None:
    """Measures and publishes for ever, and logs each measurement once its transaction is over."""
    count = 0
    while True:
        with Writer(file) as writer:
            for _ in range(20):
                count += 1
                problem = count % PROBLEMS
                plan = plan_of(problem, 1 + count % CPU.sms)
                mark = f"{name}-{count}"
                found = Measurement(plan, False, None, 1e-3, 0.0, None, 5, 1.0, "right")
                writer.measured(TASKS[problem], store.space(CPU), mark, [found])
                os.write(log, f"{mark}\n".encode())
                writer.publish(TASKS[problem], store.space(CPU), Winner(plan, 1e-3, 0.0, plan, 1e-3), STAMP)


def read(file: Path, log: int) -> None:
    """Looks up and counts misses for ever; logs what no caller may see."""
    warnings.simplefilter("error")
    try:
        while True:
            mirror = store.Mirror(file)
            for _ in range(10):
                mirror.refresh()
                for i, task in enumerate(TASKS):
                    plan = mirror.plan(task.problem, CPU, CPU.sms)
                    if plan is not None and plan.tile_n != plan_of(i, 1).tile_n:
                        os.write(log, f"wrong {plan} for problem {i}\n".encode())
                store.add_misses(file, {TASKS[0]: 1})
                time.sleep(0.002)
    except Exception as error:
        os.write(log, f"raised {error!r}\n".encode())


def child(body: object, *arguments: object) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            body(*arguments)  # type: ignore[operator]
        finally:
            os._exit(1)
    return pid


def main(folder: Path, kills: int, seed: int) -> None:
    file, chance = folder / "plans.db", random.Random(seed)
    logs = {role: os.open(folder / role, os.O_WRONLY | os.O_APPEND | os.O_CREAT) for role in ("written", "errors")}
    Writer(file).close()
    serial = 0

    def start(role: str) -> int:
        nonlocal serial
        serial += 1
        return child(write, serial, file, logs["written"]) if role == "writer" else child(read, file, logs["errors"])

    alive = [(role, start(role)) for role in ["reader"] * READERS + ["writer"] * WRITERS]
    for _ in range(kills):
        time.sleep(chance.uniform(0.0, 0.03))
        victim = chance.choice([*range(READERS), *range(READERS, len(alive)), *range(READERS, len(alive))])
        role, pid = alive[victim]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        alive[victim] = (role, start(role))
    deadline = time.monotonic() + 60  # a slow disk: the survivors go on until there is enough to be lost
    while (folder / "written").read_text().count("\n") < 5 * PROBLEMS and time.monotonic() < deadline:
        time.sleep(0.1)
    for _, pid in alive:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    written = (folder / "written").read_text().split()
    connection = sqlite3.connect(file)
    kept = {row[0] for row in connection.execute("SELECT sweep FROM measurements")}
    report = {
        "errors": (folder / "errors").read_text().splitlines(),
        "written": len(written),
        "lost": sorted(set(written) - kept),
        "integrity": connection.execute("PRAGMA integrity_check").fetchone()[0],
        "set_aside": [entry.name for entry in folder.iterdir() if "corrupt" in entry.name],
        "winners": connection.execute("SELECT count(*) FROM winners").fetchone()[0],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
