"""What this machine can run, and why: facts for a person or a program, and one small GEMM to prove them."""

import ctypes
import importlib.metadata
import os
import platform
import re
import stat
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from . import __version__, backends, cache, compiler, device, native
from .device import cpu_name
from .dlpack import LEGACY_STREAM, Tensor
from .errors import BackendUnavailable, DriverError, Fp8GemmError

TRIAL = (72, 272, 400)  # M, N, K: no multiple of a tile or a scale block
PATIENCE = 60.0  # seconds that one step may take: a driver or a lock may hang
PACKAGES = ("numpy", "cuda-python", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "torch", "cupy", "deep_gemm")

T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    id: int
    name: str
    capability: str
    sms: int
    memory_bytes: int | None
    l2_bytes: int
    hopper: bool


@dataclass(frozen=True)
class Driver:
    cuda: str | None  # the newest CUDA that it runs
    release: str | None
    error: str | None


@dataclass(frozen=True)
class Compiler:
    chosen: str  # what FP8GEMM_COMPILER says
    kind: str | None
    version: str | None
    origin: str | None
    fits_driver: bool | None  # None where one of the two is missing
    error: str | None


@dataclass(frozen=True)
class Cache:
    directory: str
    writable: bool
    error: str | None
    writable_by_others: bool
    entries: int
    bytes: int


@dataclass(frozen=True)
class Cpu:
    name: str
    features: str | None
    cores: int
    error: str | None


@dataclass(frozen=True)
class Trial:
    """One small GEMM: whether its numbers are right, seconds of the first call (a compilation included)."""

    device: str
    shape: tuple[int, int, int]
    right: bool
    error_vs_rounding: float | None
    worst_row_vs_rounding: float | None
    seconds: float
    error: str | None


@dataclass(frozen=True)
class Report:
    verdict: str
    backend: str | None  # where GEMMs run: "cuda:0", "cpu", or nothing
    reasons: list[str]  # why nothing better runs, and what else is wrong
    trials: list[Trial]
    gpus: list[Gpu]
    driver: Driver
    compiler: Compiler
    cache: Cache
    cpu: Cpu
    versions: dict[str, str | None]
    environment: dict[str, str]

    @property
    def exit_code(self) -> int:
        """0: a Hopper GPU runs GEMMs; 3: only the CPU does; 1: nothing."""
        return 1 if self.backend is None else 3 if self.backend == "cpu" else 0


def examine() -> Report:
    """Looks at everything. Never raises for what the machine lacks, nor waits for ever."""
    driver = _driver()
    gpus = [] if driver.error else _gpus()
    made_by, cubins, cpu = _compiler(driver), _cache(), _cpu()
    trials: list[Trial] = []
    for where in [*(f"cuda:{gpu.id}" for gpu in gpus if gpu.hopper), "cpu"]:
        trials.append(_trial(where))
        if trials[-1].right:
            break
    backend = trials[-1].device if trials[-1].right else None
    return Report(
        _verdict(backend, gpus),
        backend,
        list(dict.fromkeys([*_missing(backend, driver, gpus, trials), *_defects(made_by, cubins, driver)])),
        trials,
        gpus,
        driver,
        made_by,
        cubins,
        cpu,
        _versions(),
        {name: value for name, value in sorted(os.environ.items()) if name.startswith("FP8GEMM_")},
    )


def _verdict(backend: str | None, gpus: list[Gpu]) -> str:
    if backend is None:
        return "Nothing here runs GEMMs"
    if backend == "cpu":
        lead = "The Hopper GPU cannot be used" if any(gpu.hopper for gpu in gpus) else "No Hopper GPU"
        return f"{lead}: the CPU backend serves"
    return f"GEMMs run on {backend} {next(gpu.name for gpu in gpus if backend == f'cuda:{gpu.id}')}"


def _missing(backend: str | None, driver: Driver, gpus: list[Gpu], trials: list[Trial]) -> list[str]:
    """Why no Hopper GPU, or none but a later one, serves."""
    failed = [f"{t.device}: {t.error or 'the small GEMM gave wrong numbers'}" for t in trials if not t.right]
    if driver.error:
        return [driver.error, *failed]
    if not gpus:
        return [f"the driver (CUDA {driver.cuda}) shows this process no GPU", *failed]
    others = [
        f"cuda:{gpu.id} is a {gpu.name} of compute capability {gpu.capability}; the kernels need 9.0 (Hopper)"
        for gpu in gpus
        if not gpu.hopper and backend in (None, "cpu")
    ]
    return others + failed


def _defects(made_by: Compiler, cubins: Cache, driver: Driver) -> list[str]:
    """What is wrong besides, or would be with a GPU."""
    found = []
    if made_by.error:
        found.append(made_by.error)
    if made_by.fits_driver is False:
        found.append(
            f"{made_by.kind} {made_by.version} builds kernels that the driver (CUDA {driver.cuda}) does not load: "
            "update the driver, or install fp8gemm[cu12]"
        )
    if cubins.error:
        found.append(f"the kernel cache cannot be written ({cubins.error}): every process compiles its own kernels")
    if cubins.writable_by_others:
        found.append(f"others may write to {cubins.directory}, and a cubin is code")
    return found


def _driver() -> Driver:
    version = ctypes.c_int()
    try:
        _patiently(lambda: native.library().driver_version(ctypes.byref(version)))
    except (Fp8GemmError, ImportError, OSError) as error:
        return Driver(None, _driver_release(), _first_line(error))
    return Driver(f"{version.value // 1000}.{version.value % 1000 // 10}", _driver_release(), None)


def _driver_release() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\s(\d{3}\.\d+(?:\.\d+)?)\s", text)
    return found[1] if found else None


def _gpus() -> list[Gpu]:
    count = ctypes.c_int()
    try:
        native.library().device_count(ctypes.byref(count))
        seen = [(i, device.read_device(i)) for i in range(count.value)]
    except (Fp8GemmError, ImportError, OSError):
        return []
    return [
        Gpu(i, d.name, f"{d.capability[0]}.{d.capability[1]}", d.sms, _memory(i), d.l2_bytes, d.capability == (9, 0))
        for i, d in seen
    ]


def _cu(result: tuple[Any, ...]) -> Any:
    """The value of a call of cuda.bindings.driver, or DriverError."""
    status, *values = result
    if int(status):
        raise DriverError(f"the CUDA driver answered {status!r}")
    return values[0] if values else None


def _memory(device_id: int) -> int | None:
    try:
        from cuda.bindings import driver

        _cu(driver.cuInit(0))
        return int(_cu(driver.cuDeviceTotalMem(_cu(driver.cuDeviceGet(device_id)))))
    except (ImportError, RuntimeError):  # a DriverError too
        return None


def _compiler(driver: Driver) -> Compiler:
    chosen = os.environ.get("FP8GEMM_COMPILER", "nvrtc")
    try:
        found = _patiently(compiler.compiler)
    except (Fp8GemmError, ImportError, OSError) as error:
        return Compiler(chosen, None, None, None, None, _first_line(error))
    fits = None if driver.cuda is None else found.major <= int(driver.cuda.split(".")[0])
    return Compiler(chosen, found.kind, found.version, found.origin, fits, None)


def _cache() -> Cache:
    """The cache of cubins, made if need be, as a GEMM would."""
    path, error, open_to_others = cache.directory() / "cubins", None, False
    entries: list[int] = []
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=path):
            pass
        open_to_others = bool(path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH))
        entries = [entry.stat().st_size for entry in path.glob("*.cubin")]
    except OSError as failure:
        error = str(failure)
    return Cache(str(path.parent), error is None, error, open_to_others, len(entries), sum(entries))


def _cpu() -> Cpu:
    try:
        features, error = native.library().cpu_features().decode(), None
    except (ImportError, OSError) as failure:
        features, error = None, _first_line(failure)
    return Cpu(cpu_name(), features, backends.cpu_threads(), error)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"fp8gemm": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _trial(where: str) -> Trial:
    started = time.perf_counter()
    try:
        check, seconds = _patiently(lambda: _multiply(where))
    except (Fp8GemmError, ImportError, OSError) as error:
        return Trial(where, TRIAL, False, None, None, time.perf_counter() - started, _first_line(error))
    return Trial(where, TRIAL, check.right, check.ratio, check.worst_row, seconds, None)


def _multiply(where: str) -> tuple[Any, float]:
    """The check of a small GEMM, and the seconds of its first call."""
    import numpy as np

    from . import accuracy, gemm, quantize

    m, n, k = TRIAL
    rng = np.random.default_rng(0)
    lhs = quantize.per_token_cast_to_fp8(rng.standard_normal((m, k), dtype=np.float32))
    rhs = quantize.per_block_cast_to_fp8(rng.standard_normal((n, k), dtype=np.float32))
    d: Any = np.full((m, n), accuracy.POISON, np.uint16)
    started = time.perf_counter()
    if where == "cpu":
        gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs, d)
    else:
        device_id = int(where.removeprefix("cuda:"))
        a, sa, b, sb = (_upload(t, device_id) for t in (*lhs, *rhs))
        result = gemm.gemm_fp8_fp8_bf16_nt((a, sa), (b, sb))
        native.library().copy_to_host(device_id, LEGACY_STREAM, result.view.data, d.nbytes, d.ctypes.data)
    seconds = time.perf_counter() - started
    a_host, b_host = ((q.numpy(), s.numpy()) for q, s in (lhs, rhs))
    return accuracy.summarise(accuracy.reference_errors(np, a_host, b_host, d)), seconds


def _upload(t: Tensor, device_id: int) -> Tensor:
    """A copy on the GPU of a row-major tensor of the CPU."""
    from cuda.bindings import driver

    copy = Tensor(t.shape, t.dtype, (native.CUDA, device_id), LEGACY_STREAM)
    host = t.numpy()
    _cu(driver.cuInit(0))
    handle = _cu(driver.cuDeviceGet(device_id))
    _cu(driver.cuCtxPushCurrent(_cu(driver.cuDevicePrimaryCtxRetain(handle))))
    try:
        _cu(driver.cuMemcpyHtoD(copy.view.data, host.ctypes.data, host.nbytes))
    finally:
        driver.cuCtxPopCurrent()
        driver.cuDevicePrimaryCtxRelease(handle)
    return copy


def _patiently(call: Callable[[], T]) -> T:
    """The call's result or exception. Raises BackendUnavailable if there is neither in PATIENCE seconds."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if errors:
        raise errors[0]
    if not results:
        raise BackendUnavailable(f"no answer in {PATIENCE:.0f} s")
    return results[0]


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
