"""Where a described problem runs: a Hopper GPU, or the CPU."""

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from . import compiler, device, native
from .errors import BackendUnavailable, CompilerNotFound, OperandError
from .plan import K_ASCENDING, Kernel, cast_kernel, copy_kernel

_kernels: dict[tuple[int, Kernel], ctypes.c_void_p] = {}
_lock = threading.Lock()


def loaded(
    device_id: int, kernel: Kernel, stream: int | None, shared_bytes: int = 0, may_build: bool | None = None
) -> ctypes.c_void_p:
    """The kernel on that device, compiled and loaded if this process has not used it yet, for a call on `stream`.

    `may_build` is what FP8GEMM_STRICT says by default. Raises BackendUnavailable (no Hopper, no driver, no compiler, a
    driver too old, a fork after CUDA was used) or NotPrepared (in a capture, or it would have to be built but may not).
    """
    found = _kernels.get((device_id, kernel))
    if found is not None:
        return found
    device.require_hopper(device_id)
    native.library().require_no_capture(device_id, stream)
    try:
        cubin = compiler.cubin(kernel, not compiler.strict() if may_build is None else may_build)
    except CompilerNotFound as error:
        raise BackendUnavailable(f"cuda:{device_id}: {error}") from error
    _check_driver()
    with _lock:
        if (device_id, kernel) not in _kernels:
            _kernels[device_id, kernel] = _load(device_id, kernel, cubin, shared_bytes)
        return _kernels[device_id, kernel]


def loaded_again(device_id: int, kernel: Kernel, shared_bytes: int, times: int) -> list[ctypes.c_void_p]:
    """The same `times` more, for one who wants its code at other addresses too. For good: nothing unloads a kernel."""
    cubin = compiler.cubin(kernel)
    return [_load(device_id, kernel, cubin, shared_bytes) for _ in range(times)]


def _load(device_id: int, kernel: Kernel, cubin: bytes, shared_bytes: int) -> ctypes.c_void_p:
    handle, function = ctypes.c_void_p(), kernel.function.encode()
    started = time.perf_counter()
    native.library().kernel_load(device_id, cubin, len(cubin), function, shared_bytes, ctypes.byref(handle))
    compiler.debug(kernel, f"loaded on cuda:{device_id} in {1e3 * (time.perf_counter() - started):.1f} ms")
    return handle


def _check_driver() -> None:
    """Cubins of a major CUDA version need a driver of that version."""
    version = ctypes.c_int()
    native.library().driver_version(ctypes.byref(version))
    made_by = compiler.compiler()
    if made_by.major > version.value // 1000:
        raise BackendUnavailable(
            f"the driver is of CUDA {version.value // 1000}.{version.value % 1000 // 10}, but {made_by.kind} "
            f"{made_by.version} builds kernels for CUDA {made_by.major}: update the driver, or install fp8gemm[cu12]"
        )


def run(entry: native.Entry, operands: native.Operands, found: native.Problem, stream: int | None) -> None:
    """One GEMM as its entry of the table says: on CUDA on the stream, on the CPU now."""
    native.library().run(ctypes.byref(entry), ctypes.byref(operands), ctypes.byref(found), stream)


def cuda_cast(
    per_block: bool, input_type: int, x: native.Tensor, q: native.Tensor, s: native.Tensor, stream: int
) -> None:
    """Launches a quantiser."""
    if x.shape[0] == 0 or x.shape[1] == 0:
        return
    kernel = loaded(x.device_id, cast_kernel(per_block, input_type), stream)
    native.library().launch_cast(kernel, per_block, ctypes.byref(x), ctypes.byref(q), ctypes.byref(s), stream)


def cuda_copy(x: native.Tensor, s: native.Tensor, stream: int) -> None:
    """Launches a copy of float32 scales into another layout."""
    if 0 not in x.shape[: x.ndim]:
        kernel = loaded(x.device_id, copy_kernel(), stream)
        native.library().launch_copy(kernel, ctypes.byref(x), ctypes.byref(s), stream)


CPU_SPACE_VERSION = 1  # of CpuPlan: a stored plan of another version is not read
CPU_TILE_NS = tuple(range(16, 257, 16))  # native/host/cpu_gemm.cpp


class CpuPlan(NamedTuple):
    """How the CPU backend computes: worker threads, columns of D that one takes at a time."""

    threads: int
    tile_n: int

    @property
    def num_sms(self) -> int:
        """Cores, which are to a CPU what SMs are to a GPU."""
        return self.threads

    @property
    def reduction(self) -> str:
        """How K is summed; see `Plan.reduction`."""
        return K_ASCENDING

    def violations(self, kind: int, device: device.Device) -> Iterator[str]:
        """Every rule that the plan breaks, in words; none if it is legal."""
        if not 1 <= self.threads <= device.sms:
            yield f"{self.threads} threads, allowed are 1 to {device.sms}"
        if self.tile_n not in CPU_TILE_NS:
            yield f"tile_n {self.tile_n}, allowed are {CPU_TILE_NS}"

    def __str__(self) -> str:
        return f"{self.threads} thread{'s' * (self.threads > 1)}, {self.tile_n} columns"


def cpu_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_device() -> device.Device:
    """This machine's CPU as plans and the store see it: its cores as SMs.

    Raises OperandError for an FP8GEMM_CPU that says nothing.
    """
    limit = os.environ.get("FP8GEMM_CPU", "")
    if limit not in ("", "avx512f", "avx2", "baseline"):
        raise OperandError("FP8GEMM_CPU", f"{limit!r}; must be avx2 or baseline")
    name = f"{device.cpu_name()}, {native.library().cpu_features().decode()}"
    return device.Device(name, (0, 0), cpu_threads(), 0, 0, 0.0, 0.0)


def cpu_cast(per_block: bool, x: native.Tensor, q: native.Tensor, s: native.Tensor) -> None:
    """Quantises now."""
    native.library().cpu_cast(per_block, ctypes.byref(x), ctypes.byref(q), ctypes.byref(s), cpu_threads())


def cpu_copy(x: native.Tensor, s: native.Tensor) -> None:
    """Copies float32 scales into another layout, now."""
    native.library().cpu_copy(ctypes.byref(x), ctypes.byref(s))
