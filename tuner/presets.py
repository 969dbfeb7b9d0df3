"""Which problems to tune: presets of real layers, and what the command line names."""

import functools
import tomllib
from collections.abc import Iterable, Sequence
from importlib import resources
from typing import Any

from fp8gemm import native, planner
from fp8gemm.device import Device
from fp8gemm.errors import OperandError
from fp8gemm.planner import bucket
from fp8gemm.problem import Problem
from fp8gemm.store import Task

CPU_ROWS = (8, 16, 64)  # of a preset, where nobody names others: a CPU takes hours for thousands


@functools.cache
def presets() -> dict[str, dict[str, Any]]:
    """presets.toml."""
    return tomllib.loads(resources.files(__package__).joinpath("presets.toml").read_text())


def preset(name: str, ms: Sequence[int] | None = None) -> list[Problem]:
    """The problems of a preset; `ms` in place of its own rows. Raises OperandError if there is none of that name."""
    if name not in presets():
        raise OperandError("preset", f"{name!r}; there are {', '.join(presets())}")
    wanted = presets()[name]
    found = [problem(native.DENSE, m, n, k) for n, k in wanted.get("dense", []) for m in ms or wanted["m"]]
    found += [problem(native.CONTIGUOUS, m, n, k, groups) for groups, m, n, k in wanted.get("contiguous", [])]
    found += [problem(native.MASKED, m, n, k, groups, rows) for groups, m, rows, n, k in wanted.get("masked", [])]
    return list(dict.fromkeys(found))


def problem(kind: int, m: int, n: int, k: int, groups: int = 1, expected_m: int = 0) -> Problem:
    """A problem as calls look it up: rows rounded up to their buckets."""
    return Problem(kind, bucket(m), n, k, groups, bucket(min(expected_m, m)))


def called(kind: int, m: int, n: int, k: int, groups: int, expected_m: int, row_scales: bool) -> Problem:
    """The problem of calls with these sizes, `expected_m` as they pass it."""
    found = native.Problem(kind, native.CPU, 0, m, n, k, groups, True, True, True)
    return planner.problem_of(planner.make_key(found, expected_m))._replace(row_scales=row_scales)


def tasks(problems: Iterable[Problem], device: Device, limits: Sequence[int] | None = None) -> list[Task]:
    """Each problem under each limit of SMs. Raises OperandError for a limit that the device does not have."""
    for limit in limits or ():
        if not 1 <= limit <= device.sms:
            raise OperandError("num_sms", f"{limit}; {device.name} has 1 to {device.sms}")
    return [Task(p, device.name, device.sms, limit) for p in problems for limit in limits or [device.sms]]
