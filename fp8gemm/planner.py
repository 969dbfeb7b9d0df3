"""Which plan a problem gets. Calls find it in the table of native/host/table.cpp; a miss is resolved here, and
`prepare` resolves ahead of all calls.
"""

import ctypes
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from . import backends, compiler, cost, native, store
from .backends import CpuPlan, cpu_device
from .device import Device, require_hopper
from .errors import BackendUnavailable, CompileError, CompilerNotFound, NotPrepared, OperandError
from .plan import K_ASCENDING, Kernel, Plan, cast_kernel, copy_kernel, reference_kernel
from .problem import KINDS, Problem

CPU_TILE_M = 256  # native/host/cpu_gemm.cpp


_current: dict[bytes, Plan | CpuPlan | None] = {}  # by key: the table in Python's terms


def follow() -> None:
    """Called when the table has entries; `live` puts what follows the store in its place."""


class Listed(NamedTuple):
    """One entry of the table, and how often it was looked up since the last listing."""

    key: native.Key
    from_store: bool
    calls: int


def bucket(m: int) -> int:
    """Rows for which one plan serves: 8, then the next multiple of 16 up to 128, of 64 up to 1024, of 256 above.

    A plan depends on M through its number of tiles and, with few rows, through their height.
    """
    return int(native.library().bucket(m))


def default_plan(problem: Problem, device: Device, num_sms: int, batch_invariant: bool = False) -> Plan | CpuPlan:
    """The plan of a problem that nobody has tuned, on `num_sms` of the device's SMs."""
    if device.is_cpu:
        return _cpu_default(problem, num_sms)
    return cost.default_plan(problem, device, num_sms, batch_invariant)


def _cpu_default(problem: Problem, threads: int) -> CpuPlan:
    rows = -(-problem.m // CPU_TILE_M)
    for tile_n in (256, 128, 64):
        if rows * (problem.n // tile_n) >= 4 * threads:  # enough tiles that none waits long for the last
            return CpuPlan(threads, tile_n)
    return CpuPlan(threads, 32)


def set_batch_invariant(enabled: bool) -> None:
    """Makes all calls of this process that do not say `batch_invariant=` batch-invariant, or not (the default).

    Raises OperandError for anything but a bool.
    """
    if not isinstance(enabled, bool):
        raise OperandError("enabled", f"{enabled!r}; must be a bool")
    native.library().set_batch_invariant(enabled)


def get_batch_invariant() -> bool:
    """What `set_batch_invariant` said."""
    return bool(native.library().batch_invariant())


def check_invariance(batch_invariant: Any) -> None:
    """Raises OperandError unless a call may say that."""
    if not (batch_invariant is None or isinstance(batch_invariant, bool)):
        raise OperandError("batch_invariant", f"{batch_invariant!r}; must be a bool, or None: as set")


def make_key(found: native.Problem, expected_m: int = 0, batch_invariant: bool | None = False) -> native.Key:
    """What a described call is looked up by, with the SM limit in force. `batch_invariant` None: as set."""
    key, invariant = native.Key(), -1 if batch_invariant is None else int(bool(batch_invariant))
    native.library().make_key(ctypes.byref(found), min(expected_m, 2**31), invariant, ctypes.byref(key))
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
    return _default_of(key, device), False


def _default_of(key: native.Key, device: Device) -> Plan | CpuPlan:
    return default_plan(problem_of(key), device, key.num_sms or device.sms, bool(key.batch_invariant))


def resolve(key: native.Key, stream: int | None = None) -> native.Entry:
    """Chooses a plan for the calls of a key, loads its kernel and puts both into the table.

    A plan of the store that does not compile here gives way to the default. Raises what loading raises (see
    `backends.loaded`); the table is then as it was.
    """
    plan, from_store = choose(key)
    try:
        try:
            entry = publish(key, plan, from_store, stream)
        except CompileError:
            if not from_store:
                raise
            entry = publish(key, _default_of(key, device_of(key)), False, stream)
        native.library().find(ctypes.byref(key))  # counts this call too
        return entry
    except NotPrepared as error:
        raise NotPrepared(f"{_words(key)} on cuda:{key.device_id}: {error}") from None


def publish(
    key: native.Key,
    plan: Plan | CpuPlan | None,
    from_store: bool,
    stream: int | None = None,
    may_build: bool | None = None,
) -> native.Entry:
    """Loads the kernel of a plan (None: the reference kernel), then lets the calls of a key find both.

    Calls that run meanwhile use what was there before. `stream` and `may_build` are for `backends.loaded`.
    """
    entry = entry_of(key, plan, from_store, stream, may_build)
    native.library().put(ctypes.byref(entry))
    _current[bytes(key)] = plan
    follow()
    return entry


def entry_of(
    key: native.Key,
    plan: Plan | CpuPlan | None,
    from_store: bool = False,
    stream: int | None = None,
    may_build: bool | None = None,
) -> native.Entry:
    """What the table would hold, which `backends.run` takes, with the plan's kernel loaded."""
    entry = native.Entry(key=key, from_store=from_store)
    if isinstance(plan, CpuPlan):
        entry.cpu_plan = native.CpuPlan(*plan)
    else:
        shared_bytes = plan.shared_bytes if plan else 0
        entry.kernel = backends.loaded(key.device_id, _kernel(key, plan), stream, shared_bytes, may_build).value
        entry.plan = plan.native() if plan else native.Plan()
    return entry


def current(key: native.Key) -> Plan | CpuPlan | None:
    """The plan in the table; None if there is none, or for the reference kernel."""
    return _current.get(bytes(key))


def _kernel(key: native.Key, plan: Plan | None) -> Kernel:
    return plan.kernel(key.kind) if plan else reference_kernel(key.kind)


def _words(key: native.Key) -> str:
    if key.reference:
        return f"{KINDS[key.kind]}, strides that TMA cannot take or K = 0"
    sizes = ("m", "n", "k", "groups", "expected_m") if key.kind else ("m", "n", "k")
    return ", ".join([KINDS[key.kind], *(f"{name} = {getattr(key, name)}" for name in sizes)])


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


# ---- ahead of all calls


class Shapes(NamedTuple):
    """Calls to prepare for: one weight (N, K), or G of them, and every number of rows that it may meet.

    `kind` is "dense", "contiguous", "ragged" or "masked"; `m` the rows of a (masked: Mmax), a number or any iterable of
    them such as `range(1, 4097)`; `expected_m` what the calls will pass as such, if anything.
    """

    n: int
    k: int
    m: int | Iterable[int]
    kind: str = "dense"
    groups: int = 1
    expected_m: int | Iterable[int] = 0


class Prepared(NamedTuple):
    """What `prepare` did: entries of the table, and the distinct kernels that are loaded for them."""

    plans: int
    kernels: int


def prepare(shapes: Shapes | Iterable[Shapes], *, device: int = 0, batch_invariant: bool | None = None) -> Prepared:
    """Compiles, loads and plans everything that calls of these shapes need, so that none of them has to.

        fp8gemm.prepare([fp8gemm.Shapes(n=7168, k=2048, m=range(1, 4097)), ...], device=0)

    For servers, before the first request and before any CUDA graph is captured. Covers every layout of the operands and
    the quantisers; `batch_invariant` as the calls will pass it; for the SM limit in force now (`set_num_sms`). Kernels
    are compiled in parallel, on as many threads as there are cores, unless this machine has them already.

    Raises OperandError for impossible shapes, BackendUnavailable if `device` cannot run them, CompileError.
    """
    if isinstance(device, bool) or not isinstance(device, int):
        raise OperandError("device", f"{device!r}; must be the number of a GPU")
    check_invariance(batch_invariant)
    require_hopper(device)
    native.library().check_fork()
    wanted = [shapes] if isinstance(shapes, Shapes) else list(shapes)
    keys = {bytes(key): key for given in wanted for key in _keys(given, device, batch_invariant)}
    chosen = [(key, *choose(key)) for key in keys.values()]
    casts = [cast_kernel(per_block, x) for per_block in (False, True) for x in range(3)]
    others = [*casts, copy_kernel()]
    kernels = {_kernel(key, plan) for key, plan, _ in chosen if not isinstance(plan, CpuPlan)}.union(others)
    try:
        with ThreadPoolExecutor(backends.cpu_threads()) as pool:
            list(pool.map(compiler.cubin, kernels))
    except CompilerNotFound as error:
        raise BackendUnavailable(f"cuda:{device}: {error}") from error
    for kernel in others:
        backends.loaded(device, kernel, None, may_build=True)
    for key, plan, from_store in chosen:
        publish(key, plan, from_store, may_build=True)
    return Prepared(len(chosen), len(kernels))


def _keys(given: Shapes, device: int, batch_invariant: bool | None) -> Iterator[native.Key]:
    """Keys of all calls of these shapes, some more than once."""
    if given.kind not in KINDS:
        raise OperandError("kind", f"{given.kind!r}, known are {', '.join(KINDS)}")
    ms, expected = (sorted(set(x) if isinstance(x, Iterable) else {x}) for x in (given.m, given.expected_m))
    limits = {"n": [given.n], "k": [given.k], "m": ms, "groups": [given.groups], "expected_m": expected}
    for name, values in limits.items():
        least = 1 if name in ("n", "groups") else 0
        for value in (*values[:1], *values[-1:]):
            if not isinstance(value, int) or not least <= value < 2**31:
                raise OperandError(name, f"{value!r}; must be an int from {least} to {2**31 - 1}")
    if given.k % 16:
        raise OperandError("k", f"{given.k}; must be a multiple of 16")
    kind = KINDS.index(given.kind)
    if kind == native.DENSE and given.groups != 1:
        raise OperandError("groups", f"{given.groups}; a dense problem has 1")
    buckets = {bucket(m) for m in ms} - {0}
    for m, rows, by_tma, by_bulk in itertools.product(buckets, expected, (True, False), (True, False)):
        found = native.Problem(kind, native.CUDA, device, m, given.n, given.k, given.groups, by_tma, True, by_bulk)
        yield make_key(found, rows, batch_invariant)
