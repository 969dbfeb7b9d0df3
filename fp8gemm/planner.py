"""Which plan a problem gets. Calls find it in the table of native/host/table.cpp; a miss is resolved here."""

import ctypes
from typing import NamedTuple

from . import cost, native
from .backends import CpuPlan, cpu_threads, loaded
from .device import Device, require_hopper
from .plan import Plan, reference_kernel
from .problem import Problem

CPU_TILE_M = 256  # native/host/cpu_gemm.cpp


class Listed(NamedTuple):
    """One entry of the table, and how often it was looked up since the last listing."""

    key: native.Key
    from_store: bool
    calls: int


def bucket(m: int) -> int:
    """Rows for which one plan serves: the next multiple of 16 up to 128, of 64 up to 1024, of 256 above.

    A plan depends on M through its number of tiles, of at least 64 rows; finer steps would only cost host time.
    """
    return int(native.library().bucket(m))


def chosen(problem: Problem, device: Device, num_sms: int) -> tuple[Plan, bool]:
    """The plan that a problem shall get on `num_sms` of the device's SMs, and whether it comes from the store."""
    return cost.default_plan(problem, device, num_sms), False


def chosen_cpu(problem: Problem) -> tuple[CpuPlan, bool]:
    """The CPU backend's plan that a problem shall get, and whether it comes from the store."""
    threads = cpu_threads()
    rows = -(-problem.m // CPU_TILE_M)
    for tile_n in (256, 128, 64):
        if rows * (problem.n // tile_n) >= 4 * threads:  # enough tiles that none waits long for the last
            return CpuPlan(threads, tile_n), False
    return CpuPlan(threads, 32), False


def make_key(found: native.Problem, expected_m: int = 0, batch_invariant: bool = False) -> native.Key:
    """What a described call is looked up by, with the SM limit in force."""
    key = native.Key()
    native.library().make_key(ctypes.byref(found), min(expected_m, 2**31), batch_invariant, ctypes.byref(key))
    return key


def problem_of(key: native.Key) -> Problem:
    """The problem that the plan of a key is chosen for. A key of the reference kernel has none."""
    return Problem(key.kind, key.m, key.n, key.k, key.groups, key.expected_m, bool(key.row_scales))


def planned(key: native.Key, stream: int | None) -> native.Entry:
    """What the calls of a key do: from the table, or resolved and put there now, for a call on `stream`."""
    if entry := native.library().find(ctypes.byref(key)):
        found: native.Entry = entry.contents
        return found
    return resolve(key, stream)


def choose(key: native.Key) -> tuple[Plan | CpuPlan | None, bool]:
    """The plan that the calls of a key shall get (None: the reference kernel) and whether it comes from the store."""
    if key.device_type == native.CPU:
        return chosen_cpu(problem_of(key))
    device = require_hopper(key.device_id)
    if key.reference:
        return None, False
    return chosen(problem_of(key), device, key.num_sms or device.sms)


def resolve(key: native.Key, stream: int | None = None) -> native.Entry:
    """Chooses a plan for the calls of a key, loads its kernel and puts both into the table.

    Raises what loading raises (see `backends.loaded`); the table is then as it was.
    """
    return publish(key, *choose(key), stream)


def publish(key: native.Key, plan: Plan | CpuPlan | None, from_store: bool, stream: int | None = None) -> native.Entry:
    """Loads the kernel of a plan (None: the reference kernel), then lets the calls of a key find both.

    Calls that run meanwhile use what was there before.
    """
    entry = native.Entry(key=key, from_store=from_store)
    if isinstance(plan, CpuPlan):
        entry.cpu_plan = native.CpuPlan(*plan)
    elif plan is None:
        entry.kernel = loaded(key.device_id, reference_kernel(key.kind), stream).value
    else:
        entry.kernel = loaded(key.device_id, plan.kernel(key.kind), stream, plan.shared_bytes).value
        entry.plan = plan.native()
    native.library().put(ctypes.byref(entry))
    return entry


def listing() -> list[Listed]:
    """Every entry of the table with its calls since the last listing: those not from the store are misses."""
    library = native.library()
    room = library.entries(None, None, 0) + 64  # calls may add some meanwhile; what finds no room is listed next time
    entries, calls = (native.Entry * room)(), (ctypes.c_uint64 * room)()
    count = min(library.entries(entries, calls, room), room)
    keys = (native.Key.from_buffer_copy(entries[i].key) for i in range(count))
    return [Listed(key, bool(entries[i].from_store), calls[i]) for i, key in enumerate(keys)]


def forget() -> None:
    """Empties the table: the next call of each problem is a miss, and chooses anew."""
    native.library().forget_plans()
