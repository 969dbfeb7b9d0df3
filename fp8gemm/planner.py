"""Which plan a problem gets. Calls find it in the table of native/host/table.cpp; a miss is resolved here."""

import ctypes
from typing import NamedTuple

from . import cost, native, store
from .backends import CpuPlan, cpu_device, loaded
from .device import Device, require_hopper
from .plan import K_ASCENDING, Plan, reference_kernel
from .problem import Problem

CPU_TILE_M = 256  # native/host/cpu_gemm.cpp


_current: dict[bytes, Plan | CpuPlan | None] = {}  # by key: the table in Python's terms


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


def default_plan(problem: Problem, device: Device, num_sms: int) -> Plan | CpuPlan:
    """The plan of a problem that nobody has tuned, on `num_sms` of the device's SMs."""
    return _cpu_default(problem, num_sms) if device.is_cpu else cost.default_plan(problem, device, num_sms)


def _cpu_default(problem: Problem, threads: int) -> CpuPlan:
    rows = -(-problem.m // CPU_TILE_M)
    for tile_n in (256, 128, 64):
        if rows * (problem.n // tile_n) >= 4 * threads:  # enough tiles that none waits long for the last
            return CpuPlan(threads, tile_n)
    return CpuPlan(threads, 32)


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


def device_of(key: native.Key) -> Device:
    """The device of a key. Raises BackendUnavailable if it can run no plan."""
    return cpu_device() if key.device_type == native.CPU else require_hopper(key.device_id)


def stored(key: native.Key, device: Device) -> Plan | CpuPlan | None:
    """The store's plan for the calls of a key, as far as this process has read it."""
    if key.reference:
        return None
    plan = store.plan(problem_of(key), device, key.num_sms or device.sms)
    return None if plan and key.batch_invariant and plan.reduction != K_ASCENDING else plan


def choose(key: native.Key) -> tuple[Plan | CpuPlan | None, bool]:
    """The plan that the calls of a key shall get (None: the reference kernel) and whether it comes from the store."""
    device = device_of(key)
    if key.reference:
        return None, False
    if plan := stored(key, device):
        return plan, True
    return default_plan(problem_of(key), device, key.num_sms or device.sms), False


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
    _current[bytes(key)] = plan
    return entry


def current(key: native.Key) -> Plan | CpuPlan | None:
    """The plan in the table; None if there is none, or for the reference kernel."""
    return _current.get(bytes(key))


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
    _current.clear()
