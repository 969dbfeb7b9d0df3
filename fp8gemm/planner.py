"""Which plan a problem gets."""

from . import cost, native
from .backends import CpuPlan, cpu_threads
from .device import Device, get_num_sms, require_hopper
from .plan import Plan
from .problem import Problem

EXPECTED_M_MARGIN = 1.2  # what callers of DeepGEMM's masked form put on top of the mean rows of a group
CPU_TILE_M = 256  # native/host/cpu_gemm.cpp


def bucket(m: int) -> int:
    """Rows for which one plan serves: the next multiple of 16 up to 128, of 64 up to 1024, of 256 above.

    A plan depends on M through its number of tiles, of at least 64 rows; finer steps would only cost host time.
    """
    step = 16 if m <= 128 else 64 if m <= 1024 else 256
    return -(-m // step) * step


def cuda_plan(found: native.Problem, expected_m: int = 0) -> Plan | None:
    """The plan of a described problem on its device; None where only the reference kernel can run it."""
    if not found.inputs_by_tma or found.k == 0 or found.m == 0:
        return None
    device = require_hopper(found.device_id)
    m = found.m if found.kind == native.MASKED and not expected_m else bucket(found.m)
    rows = round(expected_m / EXPECTED_M_MARGIN) if found.kind == native.MASKED else expected_m
    problem = Problem(found.kind, m, found.n, found.k, found.groups, bucket(rows))
    return cost.default_plan(problem, device, get_num_sms(found.device_id))


def default_plan(problem: Problem, device: Device, num_sms: int) -> Plan | CpuPlan:
    """The plan of a problem that nobody has tuned, on `num_sms` of the device's SMs."""
    return cpu_default(problem, num_sms) if device.is_cpu else cost.default_plan(problem, device, num_sms)


def cpu_default(problem: Problem, threads: int) -> CpuPlan:
    """Tiles as wide as leave enough of them that no thread waits long for the last."""
    rows = -(-problem.m // CPU_TILE_M)
    for tile_n in (256, 128, 64):
        if rows * (problem.n // tile_n) >= 4 * threads:
            return CpuPlan(threads, tile_n)
    return CpuPlan(threads, 32)


def cpu_plan(found: native.Problem) -> CpuPlan:
    """The CPU backend's plan of a described problem."""
    return cpu_default(Problem(found.kind, found.m, found.n, found.k, found.groups), cpu_threads())
