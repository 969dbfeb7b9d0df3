"""Measuring on a Hopper GPU, by the CUDA driver alone: no framework is needed.

Operands are filled on the device, outputs compared there with the reference kernel's. Times are between two events on a
stream of our own, each launch after a read of more than L2 holds, which leaves it clean, and after other code.
"""

import ctypes
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from fp8gemm import accuracy, backends, compiler, native, planner
from fp8gemm.device import require_hopper
from fp8gemm.errors import BackendUnavailable, DriverError
from fp8gemm.layout import ceil_div, get_tma_aligned_size
from fp8gemm.plan import Kernel, Plan, reference_kernel, tuner_kernels
from fp8gemm.store import AnyPlan, Task

from . import operands
from .build import Builder
from .measure import Rig, Stop
from .nvml import Nvml
from .target import Say
from .writer import Stamp

FLUSH_BYTES = 256 << 20  # five times the L2 of a Hopper
SHARED_FLUSH = 2  # times L2, beside a serving process
LOADS = 8  # of each kernel, each with a copy of the operands: where code and operands lie moves times by percents
FINAL_LOADS = 32  # of a finalist's kernel, others than before: what led by a lucky address then falls back
RESERVE = 1 << 30  # bytes that operands leave: kernels stay loaded, several times
BURST = 0.02  # seconds of GEMMs in a row, before as long a rest
DISTURBED = 1.15  # a round counts only if its flush, whose time is known, took at most this much longer
THREADS = 256
GRID = 132 * 8
_POISON32 = accuracy.POISON << 16 | accuracy.POISON


def cu(result: tuple[Any, ...]) -> Any:
    """The value of a call of cuda.bindings.driver. Raises DriverError, in the driver's words, if it failed."""
    from cuda.bindings import driver

    status, *values = result
    if int(status):
        _, text = driver.cuGetErrorString(status)
        raise DriverError(f"{status.name}: {text.decode() if text else 'unknown'}")
    return values[0] if values else None


class Gpu:
    """A device's primary context, a stream, memory, and the tuner's own kernels."""

    def __init__(self, device_id: int) -> None:
        from cuda.bindings import driver

        self.driver: Any = driver
        cu(driver.cuInit(0))
        self.handle = cu(driver.cuDeviceGet(device_id))
        self._context = cu(driver.cuDevicePrimaryCtxRetain(self.handle))
        cu(driver.cuCtxSetCurrent(self._context))
        self._stream = cu(driver.cuStreamCreate(1))  # does not wait for the default stream
        self.stream = int(self._stream)
        self._events: list[Any] = []
        module = cu(driver.cuModuleLoadData(compiler.cubin(tuner_kernels())))
        self._functions = {
            name: cu(driver.cuModuleGetFunction(module, f"fp8gemm_{name}".encode()))
            for name in ("fill_e4m3", "fill_scales", "flush", "compare")
        }

    @property
    def uuid(self) -> str:
        """As NVML writes it."""
        text = bytes(cu(self.driver.cuDeviceGetUuid(self.handle)).bytes).hex()
        return "GPU-" + "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))

    def free_bytes(self) -> int:
        status, free, _ = self.driver.cuMemGetInfo()
        cu((status,))
        return int(free)

    def allocate(self, size: int) -> int:
        return int(cu(self.driver.cuMemAlloc(max(size, 16))))

    def release(self, pointer: int) -> None:
        cu(self.driver.cuMemFree(pointer))

    def upload(self, pointer: int, values: Any) -> None:
        """In the order of our stream, which does not wait for what other streams copy."""
        cu(self.driver.cuMemcpyHtoDAsync(pointer, values.ctypes.data, values.nbytes, self._stream))
        self.wait()

    def download(self, values: Any, pointer: int) -> None:
        cu(self.driver.cuMemcpyDtoH(values.ctypes.data, pointer, values.nbytes))

    def fill(self, pointer: int, value: int, count: int, width: int) -> None:
        """`count` words of 2 or 4 bytes."""
        fill = self.driver.cuMemsetD16Async if width == 2 else self.driver.cuMemsetD32Async
        cu(fill(pointer, value, count, self._stream))

    def launch(self, name: str, grid: int, *arguments: tuple[int, Any]) -> None:
        """A kernel of ours; `arguments`: values and their ctypes."""
        values, types = zip(*arguments, strict=True)
        shape = grid, 1, 1, THREADS, 1, 1
        cu(self.driver.cuLaunchKernel(self._functions[name], *shape, 0, self._stream, (values, types), 0))

    def event(self, index: int) -> Any:
        """Events to record, made once and used again."""
        while len(self._events) <= index:
            self._events.append(cu(self.driver.cuEventCreate(0)))
        return self._events[index]

    def record(self, index: int) -> None:
        cu(self.driver.cuEventRecord(self.event(index), self._stream))

    def seconds(self, first: int, second: int) -> float:
        """Between two recorded events, both passed."""
        return float(cu(self.driver.cuEventElapsedTime(self.event(first), self.event(second)))) / 1e3

    def wait(self) -> None:
        cu(self.driver.cuStreamSynchronize(self._stream))

    def close(self) -> None:
        for event in self._events:
            cu(self.driver.cuEventDestroy(event))
        self._events.clear()
        cu(self.driver.cuStreamDestroy(self._stream))


class GpuRig:
    """One problem in GPU memory; `Rig` in measure.py."""

    def __init__(self, target: "GpuTarget", task: Task) -> None:
        self.gpu, self.target = target.gpu, target
        self._problem = p = task.problem
        self._pointers: list[int] = []
        self._launches: dict[AnyPlan, list[tuple[native.Entry, native.Operands]]] = {}  # one of them a round
        self._round = 0
        self._seconds: dict[AnyPlan, float] = {}  # of each plan's first launch
        self._order = random.Random(1)  # so that no plan always follows the same other one
        self._least_flush = math.inf
        self._clock_hz: float | None = None
        rows = p.m * (p.groups if p.kind == native.MASKED else 1)
        blocks, columns = ceil_div(p.k, accuracy.BLOCK), ceil_div(p.n, accuracy.BLOCK)
        groups = p.groups if p.kind != native.DENSE else 1
        lead = get_tma_aligned_size(p.m, 4)
        stacks = rows // p.m if p.m else 1
        each = rows * p.k + groups * p.n * p.k + 2 * rows * p.n + 4 * blocks * (stacks * lead + groups * columns)
        once = 4 * rows * p.n + target.flush_bytes  # the reference, what is read between
        room = target.room(each + once)
        copies = 1 if target.share else max(1, min(LOADS, (room - once) // 2 // max(each, 1)))
        try:
            self._flushed = self._allocate(target.flush_bytes)
            self.gpu.fill(self._flushed, 0, target.flush_bytes // 4, 4)
            self._operands = [self._make(p, rows, groups, blocks, columns, lead) for _ in range(copies)]
            self._found = native.Problem()
            native.library().describe(ctypes.byref(self._operands[0]), ctypes.byref(self._found))
            self._refer(rows)
        except BaseException:
            self.close()
            raise

    def _allocate(self, size: int) -> int:
        self._pointers.append(self.gpu.allocate(size))
        return self._pointers[-1]

    def _make(self, p: Any, rows: int, groups: int, blocks: int, columns: int, lead: int) -> native.Operands:
        """Random operands, and no layout yet known to be wrong: `describe` checks it as it does a caller's."""
        masked, grouped = p.kind == native.MASKED, p.kind != native.DENSE
        made = native.Operands(kind=p.kind)
        made.layout.ndim = -1
        stack = (p.groups,) if masked else ()
        weights = (groups,) if grouped else ()
        made.a = self._codes((*stack, p.m, p.k), seed=1)
        made.b = self._codes((*weights, p.n, p.k), seed=2)
        strides = (blocks, 1) if p.row_scales else (1, lead)
        each = p.m * blocks if p.row_scales else lead * blocks
        made.sa = self._scales((*stack, p.m, blocks), ((each,) if masked else ()) + strides, (rows // p.m) * each, 3)
        made.sb = self._scales((*weights, columns, blocks), None, groups * columns * blocks, 4)
        made.d = self._tensor(self._allocate(2 * rows * p.n), (*stack, p.m, p.n), 4, 16)
        if grouped:
            values = np.array(operands.layout(p), np.int32)
            pointer = self._allocate(values.nbytes)
            self.gpu.upload(pointer, values)
            made.layout = self._tensor(pointer, values.shape, 0, 32)
        return made

    def _codes(self, shape: tuple[int, ...], seed: int) -> native.Tensor:
        count = math.prod(shape)
        pointer = self._allocate(count)
        pairs = (pointer, ctypes.c_void_p), (count // 2, ctypes.c_longlong), (seed << 48, ctypes.c_ulonglong)
        self.gpu.launch("fill_e4m3", GRID, *pairs)
        return self._tensor(pointer, shape, 10, 8)

    def _scales(self, shape: tuple[int, ...], strides: Any, count: int, seed: int) -> native.Tensor:
        pointer = self._allocate(4 * count)
        values = (pointer, ctypes.c_void_p), (count, ctypes.c_longlong), (seed << 48, ctypes.c_ulonglong)
        self.gpu.launch("fill_scales", GRID, *values)
        return self._tensor(pointer, shape, 2, 32, strides)

    def _tensor(
        self, pointer: int, shape: tuple[int, ...], code: int, bits: int, strides: tuple[int, ...] | None = None
    ) -> native.Tensor:
        view = native.Tensor(data=pointer, device_type=native.CUDA, device_id=self.target.device_id, ndim=len(shape))
        view.dtype_code, view.dtype_bits, view.dtype_lanes = code, bits, 1
        view.shape[: len(shape)] = shape
        view.stride[: len(shape)] = strides or [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return view

    def _refer(self, rows: int) -> None:
        """The reference kernel's FP32 result, once. What it leaves alone, plans must leave alone too."""
        size = rows * self._problem.n
        self._reference, self._errors = self._allocate(4 * size), self._allocate(24 * rows)
        self._rows = rows
        self.gpu.fill(self._reference, _POISON32, size, 4)
        copy = native.Operands.from_buffer_copy(self._operands[0])
        copy.d.data = self._reference
        wanted, stream = reference_kernel(self._problem.kind, output_fp32=True), self.gpu.stream
        kernel = backends.loaded(self.target.device_id, wanted, stream, may_build=True)
        o, p = ctypes.byref(copy), ctypes.byref(self._found)
        native.library().launch_reference(kernel, o, p, self.gpu.stream)
        self.gpu.wait()

    def add(self, plan: AnyPlan, entries: Sequence[native.Entry]) -> None:
        """A plan, with the loads of its kernel. Each round takes the next one and the next operands, for all plans."""
        copies = self._operands
        self._launches[plan] = [(entry, copies[i % len(copies)]) for i, entry in enumerate(entries)]

    def _pair(self, plan: AnyPlan, number: int) -> tuple[native.Entry, native.Operands]:
        pairs = self._launches[plan]
        return pairs[number % len(pairs)]

    def _launch(self, entry: native.Entry, operands: native.Operands) -> None:
        o, p = ctypes.byref(operands), ctypes.byref(self._found)
        native.library().run(ctypes.byref(entry), o, p, self.gpu.stream)

    def _flush(self) -> None:
        """Fills L2 with something else, and the instruction caches too."""
        words = (self._flushed, ctypes.c_void_p), (self.target.flush_bytes // 8, ctypes.c_longlong)
        self.gpu.launch("flush", GRID, *words, (self._flushed, ctypes.c_void_p))

    def error(self, plan: AnyPlan) -> float:
        if plan not in self._launches:
            key = planner.make_key(self._found)
            first = planner.entry_of(key, plan, stream=self.gpu.stream, may_build=True)
            self.add(plan, [first, *_with_kernels(first, self.target.loads(plan, self._problem.kind))])
        entry, operands = self._pair(plan, self._round)
        n, d = self._problem.n, operands.d.data
        self.gpu.fill(d, accuracy.POISON, self._rows * n, 2)
        self._flush()
        self.gpu.record(0)
        self._launch(entry, operands)
        self.gpu.record(1)
        pointers = [(p, ctypes.c_void_p) for p in (d, self._reference)]
        self.gpu.launch("compare", self._rows, *pointers, (n, ctypes.c_longlong), (self._errors, ctypes.c_void_p))
        self.gpu.wait()
        self._seconds[plan] = self.gpu.seconds(0, 1)
        found = np.empty((self._rows, 3))
        self.gpu.download(found, self._errors)
        return judge(found, n)

    def renew(self, plans: Sequence[AnyPlan]) -> None:
        for plan in plans:
            first, _ = self._launches[plan][0]
            if others := _with_kernels(first, self.target.final_loads(plan, self._problem.kind)):
                self.add(plan, others)

    def times(self, plans: Sequence[AnyPlan], rounds: int) -> list[list[float]]:
        """The flush before each launch lasts longer than the host needs to issue it, so no gap counts.

        A GPU that multiplies all the time falls to the clock that its power limit allows within 50 ms. Models do other
        things in between, so it rests here as long as it multiplied: 4096 x 7168 x 16384 on an H200 takes 128 x 128
        703 us and 256 x 128 661 then, without rests 753 and 761. (Beside a serving process the daemon rests longer.)
        """
        turns = [turn for _ in range(rounds) for turn in self._order.sample(range(len(plans)), len(plans))]
        busy = 0.0
        for number, turn in enumerate(turns):
            if busy > BURST:
                self._rest(busy)
                busy = 0.0
            busy += self._seconds[plans[turn]]
            self.gpu.record(3 * number)
            self._flush()
            self.gpu.record(3 * number + 1)
            self._launch(*self._pair(plans[turn], self._round + number // len(plans)))
            self.gpu.record(3 * number + 2)
        self._round += rounds
        self._rest(busy)
        found: list[list[float]] = [[] for _ in plans]
        for number, turn in enumerate(turns):
            flush = self.gpu.seconds(3 * number, 3 * number + 1)
            self._least_flush = min(self._least_flush, flush)
            if not self.target.share or flush <= DISTURBED * self._least_flush:
                found[turn].append(self.gpu.seconds(3 * number + 1, 3 * number + 2))
        return found

    def _rest(self, seconds: float) -> None:
        """Waits for the GPU, reads the clock that the work left it, and lets it rest."""
        self.gpu.wait()
        self._clock_hz = self.target.clock_hz()
        if not self.target.share:
            time.sleep(seconds)

    def clock_hz(self) -> float | None:
        return self._clock_hz

    def close(self) -> None:
        while self._pointers:
            self.gpu.release(self._pointers.pop())


def _with_kernels(entry: native.Entry, kernels: Sequence[int]) -> list[native.Entry]:
    """The same launch of other loads of its kernel."""
    return [native.Entry(key=entry.key, kernel=kernel, plan=entry.plan) for kernel in kernels]


def judge(errors: Any, columns: int) -> float:
    """Error over that of rounding to bf16, from the rows that fp8gemm_compare wrote; infinite if it is wrong.

    errors (rows, 3): squares of the error and of rounding alone, elements written that belong to nobody.
    """
    error, rounding, strays = errors.T
    if strays.any() or not np.isfinite(error).all():
        return math.inf
    total = float(rounding.sum())
    if not total:
        return 1.0 if not error.any() else math.inf
    if columns >= 64:  # a shorter row may be lucky to need no rounding
        worst = error > accuracy.WORST_ROW**2 * rounding
        if worst.any():
            return math.inf
    return math.sqrt(float(error.sum()) / total)


class GpuTarget:
    """A Hopper GPU; `Target` in target.py."""

    def __init__(self, device_id: int, share: bool = False, memory_bytes: int | None = None) -> None:
        """`share`: beside a serving process, with at most `memory_bytes`. Raises BackendUnavailable or DriverError."""
        self.device_id, self.name = device_id, f"cuda:{device_id}"
        self.device = require_hopper(device_id)
        self.share, self.memory_bytes = share, memory_bytes
        self.gpu = Gpu(device_id)
        self.lock_name = self.gpu.uuid
        made_by = compiler.compiler()
        driver = ctypes.c_int()
        native.library().driver_version(ctypes.byref(driver))
        self.stamp = Stamp(f"{made_by.kind} {made_by.version}", str(driver.value), compiler.digest())
        self.flush_bytes = SHARED_FLUSH * self.device.l2_bytes if share else FLUSH_BYTES
        self._nvml = Nvml.open(self.gpu.uuid)
        self._builder: Builder | None = None
        self._loads: dict[Kernel, list[int]] = {}

    def loads(self, plan: AnyPlan, kind: int) -> list[int]:
        """The plan's kernel, loaded again, once for all problems; beside a serving process not at all."""
        return self._loaded(plan, kind, LOADS - 1)

    def final_loads(self, plan: AnyPlan, kind: int) -> list[int]:
        """The same, none of them among `loads`."""
        return self._loaded(plan, kind, LOADS - 1 + FINAL_LOADS)[LOADS - 1 :]

    def _loaded(self, plan: AnyPlan, kind: int, count: int) -> list[int]:
        if self.share or not isinstance(plan, Plan):
            return []
        kernel = plan.kernel(kind)
        found = self._loads.setdefault(kernel, [])
        if count > len(found):
            more = backends.loaded_again(self.device_id, kernel, plan.shared_bytes, count - len(found))
            found += [handle.value or 0 for handle in more]
        return found[:count]

    def room(self, needed: int) -> int:
        """Bytes for a problem's operands on this GPU now. Raises BackendUnavailable if these are too few."""
        free = self.gpu.free_bytes()
        most = free // 2 if self.share else free - RESERVE
        if self.memory_bytes is not None:
            most = min(most, self.memory_bytes)
        if needed > most:
            raise BackendUnavailable(
                f"{self.name}: the operands take {needed >> 20} MiB, there is room for {most >> 20}"
            )
        return most

    def rig(self, task: Task) -> Rig:
        return GpuRig(self, task)

    def announce(self, plans: Sequence[tuple[AnyPlan, Task]]) -> None:
        self._builders().submit(_kernels(plans))

    def build(self, plans: Sequence[AnyPlan], task: Task, stop: Stop, say: Say) -> dict[AnyPlan, str]:
        def told(done: int, total: int) -> None:
            if done < total:
                say(f"compiling kernels: {done} of {total}")

        wanted = {plan: plan.kernel(task.problem.kind) for plan in plans if isinstance(plan, Plan)}
        found = self._builders().results([*wanted.values(), reference_kernel(task.problem.kind, True)], stop, told)
        return {plan: why for plan, kernel in wanted.items() if (why := found[kernel])}

    def _builders(self) -> Builder:
        if self._builder is None:
            self._builder = Builder()
        return self._builder

    def is_idle(self) -> bool:
        """Three looks within a second. Raises BackendUnavailable where nobody tells."""
        if self._nvml is None:
            raise BackendUnavailable(f"{self.name}: NVML cannot tell whether it is idle; --share works without knowing")
        for wait in (0.0, 0.3, 0.3):
            time.sleep(wait)
            if self._nvml.utilisation():
                return False
        return True

    def check(self) -> None:
        self.gpu.wait()

    def clock_hz(self) -> float | None:
        return self._nvml.clock_hz() if self._nvml else None

    def close(self) -> None:
        if self._builder:
            self._builder.close()
        self.gpu.close()


def _kernels(plans: Sequence[tuple[AnyPlan, Task]]) -> list[Kernel]:
    found = [plan.kernel(task.problem.kind) for plan, task in plans if isinstance(plan, Plan)]
    kinds = dict.fromkeys(task.problem.kind for _, task in plans)
    return list(dict.fromkeys([reference_kernel(kind, True) for kind in kinds] + found))
