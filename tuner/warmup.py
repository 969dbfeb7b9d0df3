"""Compiles what a model will need, before it needs it."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fp8gemm import bench, device, planner, store
from fp8gemm.device import Device
from fp8gemm.plan import Kernel, Plan

from . import presets
from .build import Builder
from .measure import Stop

MOST_ROWS = 8192


class Warmed(NamedTuple):
    """What was compiled. `failed`: kernels that could not be, and why."""

    presets: list[str]
    device: str
    problems: int
    kernels: int
    compiled: int
    workers: int
    seconds: float
    failed: dict[str, str]


def run(names: Sequence[str], where: str | None, say: Callable[[str], None], stop: Stop = lambda: False) -> Warmed:
    """Every kernel that calls of these presets' layers will look for, from the store or by default.

    Raises BackendUnavailable for a GPU that is not there, CompilerNotFound without a compiler.
    """
    started = time.monotonic()
    gpu = _device(where)
    ms = sorted({planner.bucket(m) for m in range(1, MOST_ROWS + 1)})
    problems = [problem for name in names for problem in presets.preset(name, ms)]
    kernels: list[Kernel] = []
    missing = 0
    builder = Builder()
    try:
        # The first are compiled while others' plans are looked for; many rows' kernels, which take longest, not last.
        for p in sorted(problems, key=lambda p: p.m, reverse=True):
            plan = store.plan(p, gpu, gpu.sms) or planner.default_plan(p, gpu, gpu.sms)
            if isinstance(plan, Plan):
                kernel = plan.kernel(p.kind)
                kernels.append(kernel)
                missing += builder.submit([kernel])
        found = builder.results(kernels, stop, lambda done, total: say(f"compiled {done} of {total} kernels"))
    finally:
        builder.close()
    failed = {f"{kernel.function} {dict(kernel.macros)}": why for kernel, why in found.items() if why}
    spent = time.monotonic() - started
    return Warmed(list(names), gpu.name, len(problems), len(found), missing, builder.workers, spent, failed)


def _device(where: str | None) -> Device:
    best = where or device.best_device()
    return bench.H200 if best == "cpu" else device.require_hopper(int(best.removeprefix("cuda:")))
