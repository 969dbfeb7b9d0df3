"""Kernels from source: NVRTC through cuda-python, or nvcc.

No CUDA header is needed: the sources include only each other. NVRTC gets them in memory, so a build needs neither a
toolkit nor a GPU nor a driver. `FP8GEMM_COMPILER` chooses: "nvrtc" (default) or the path of an nvcc.
"""

import ctypes
import functools
import hashlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import NamedTuple

from . import cache, sass
from .errors import CompileError, CompilerNotFound, Fp8GemmError, NotPrepared
from .plan import Kernel

_OPTIONS = ("-std=c++17", "-default-device", "--ptxas-options=-v")
_FATAL_WARNINGS = {
    "C7510": "wgmma is serialised",
    "C7508": "setmaxnreg is ignored",
    "C7506": "setmaxnreg is ignored",
}


class Built(NamedTuple):
    """A fresh build and what the assembler said of it."""

    cubin: bytes
    log: str
    seconds: float
    registers: int
    spills: int  # bytes of local memory: of the stack, of spill stores and loads


class Compiler(NamedTuple):
    """Which compiler builds: kind "nvrtc" or "nvcc", its version, and where it was found."""

    kind: str
    version: str
    origin: str

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])


@functools.cache
def sources() -> dict[str, str]:
    """Every file of native/kernels, by name."""
    return sources_in(resources.files("fp8gemm.kernels"))


def sources_in(folder: Traversable) -> dict[str, str]:
    """Every CUDA source of a folder, by name."""
    names = (entry.name for entry in folder.iterdir())
    return {name: folder.joinpath(name).read_text() for name in sorted(names) if name.endswith((".cu", ".cuh", ".h"))}


@functools.cache
def compiler() -> Compiler:
    """The compiler that this process uses. Raises CompilerNotFound if there is none."""
    chosen = os.environ.get("FP8GEMM_COMPILER", "nvrtc")
    return _find_nvrtc() if chosen == "nvrtc" else _find_nvcc(chosen)


def _driver_major() -> int | None:
    from . import native

    version = ctypes.c_int()
    try:
        native.library().driver_version(ctypes.byref(version))
    except Fp8GemmError:
        return None
    return version.value // 1000


def _find_nvrtc() -> Compiler:
    if _driver_major() == 12:
        preload_nvrtc_12()
    try:
        from cuda.bindings import nvrtc
        from cuda.pathfinder import load_nvidia_dynamic_lib

        loaded = load_nvidia_dynamic_lib("nvrtc")
        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise CompilerNotFound(
            f"NVRTC cannot be loaded ({error}); `pip install nvidia-cuda-nvrtc` brings it"
        ) from error
    return Compiler("nvrtc", f"{major}.{minor}", str(loaded.abs_path))


def preload_nvrtc_12() -> bool:
    """Loads the NVRTC 12 of the extra `fp8gemm[cu12]`, if installed, so that cuda-python uses it.

    A CUDA 12 driver does not take cubins of CUDA 13, and cuda-python prefers NVRTC 13 where both are installed.
    """
    package = importlib.util.find_spec("nvidia.cuda_nvrtc") if importlib.util.find_spec("nvidia") else None
    for root in (package.submodule_search_locations or []) if package else []:
        library = Path(root) / "lib" / "libnvrtc.so.12"
        if library.exists():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return True
    return False


def _find_nvcc(path: str) -> Compiler:
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompilerNotFound(
            f"FP8GEMM_COMPILER is {path!r}, which is neither 'nvrtc' nor an nvcc: {error}"
        ) from error
    found = re.search(r"V(\d+\.\d+\.\d+)", text)
    if not found:
        raise CompilerNotFound(f"{path} --version names no version", text)
    return Compiler("nvcc", found[1], path)


def options(kernel: Kernel) -> list[str]:
    """The command line that builds a kernel, apart from file names."""
    arch = ["-gencode=arch=compute_90a,code=sm_90a"] if compiler().kind == "nvcc" else ["-arch=sm_90a"]
    standard = [o for o in _OPTIONS if compiler().kind == "nvrtc" or o != "-default-device"]
    return arch + standard + [f"-D{name}={value}" for name, value in kernel.macros]


def build(kernel: Kernel) -> Built:
    """Compiles a kernel. Raises CompileError if that fails, needs local memory, or serialises wgmma."""
    started = time.perf_counter()
    make = _build_nvcc if compiler().kind == "nvcc" else _build_nvrtc
    cubin, log = make(kernel, options(kernel))
    seconds = time.perf_counter() - started
    usage = [int(x) for x in re.findall(r"Used (\d+) registers", log)]
    spills = sum(int(x) for x in re.findall(r"(\d+) bytes (?:stack frame|spill)", log))
    built = Built(cubin, log, seconds, max(usage, default=0), spills)
    for code, meaning in _FATAL_WARNINGS.items():
        if code in log:
            raise CompileError(f"{kernel}: {meaning}", log)
    if spills:
        raise CompileError(
            f"{kernel}: {spills} bytes of local memory; registers spill, or an index is not known in time", log
        )
    return built._replace(cubin=sass.pace(cubin)) if _is_paced(kernel) else built


def _is_paced(kernel: Kernel) -> bool:
    return dict(kernel.macros).get("TILE_M", 0) >= sass.LEAST_ROWS


def _build_nvrtc(kernel: Kernel, arguments: list[str]) -> tuple[bytes, str]:
    from cuda.bindings import nvrtc

    def check(result: tuple[object, ...]) -> object:
        status, *values = result
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"NVRTC failed with {status!r}")
        return values[0] if values else None

    headers = {name: text for name, text in sources().items() if not name.endswith(".cu")}
    program = check(
        nvrtc.nvrtcCreateProgram(
            sources()[kernel.source].encode(),
            kernel.source.encode(),
            len(headers),
            [text.encode() for text in headers.values()],
            [name.encode() for name in headers],
        )
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), [a.encode() for a in arguments])
        log = bytes(int(str(check(nvrtc.nvrtcGetProgramLogSize(program)))))
        check(nvrtc.nvrtcGetProgramLog(program, log))
        text = log.rstrip(b"\0").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{kernel} does not compile ({status!r})", text)
        cubin = bytes(int(str(check(nvrtc.nvrtcGetCUBINSize(program)))))
        check(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin, text
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _build_nvcc(kernel: Kernel, arguments: list[str]) -> tuple[bytes, str]:
    with tempfile.TemporaryDirectory(prefix="fp8gemm-") as folder:
        for name, text in sources().items():
            Path(folder, name).write_text(text)
        command = [compiler().origin, "-cubin", *arguments, "-o", "kernel.cubin", kernel.source]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(f"{' '.join(command)} failed", done.stderr)
        return Path(folder, "kernel.cubin").read_bytes(), done.stderr


def key(kernel: Kernel) -> str:
    """Digest of all that the cubin depends on: compiler, options, every source that can be included, and our change."""
    parts = [*compiler()[:2], *options(kernel), kernel.function, sources()[kernel.source], _our_change()]
    parts += [text for name, text in sources().items() if not name.endswith(".cu")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def digest() -> str:
    """Of all kernels' sources, and our change to what becomes of them: with any other, times may be others."""
    parts = [f"{name}\0{source}" for name, source in sorted(sources().items())]
    return hashlib.sha256("\0".join([*parts, _our_change()]).encode()).hexdigest()[:16]


@functools.cache
def _our_change() -> str:
    return inspect.getsource(sass)


def strict() -> bool:
    """FP8GEMM_STRICT=1: no call compiles; what would have to raises NotPrepared."""
    return os.environ.get("FP8GEMM_STRICT", "0") not in ("", "0")


def cubin(kernel: Kernel, may_build: bool = True) -> bytes:
    """The kernel's cubin, from the cache or built now. NVRTC builds in as many threads as ask for kernels.

    Raises NotPrepared if it would have to be built but `may_build` is false.
    """

    def build_and_report() -> bytes:
        if not may_build:
            raise NotPrepared(
                "its kernel was never compiled on this machine, and under FP8GEMM_STRICT=1 no call compiles; "
                "fp8gemm.prepare() does, when the process starts"
            )
        built = build(kernel)
        debug(kernel, f"{' '.join(options(kernel))}\n{built.log}{built.seconds:.2f} s")
        return built.cubin

    return cache.get_or_build(key(kernel), build_and_report)


def debug(kernel: Kernel, message: str) -> None:
    """Prints to stderr under FP8GEMM_JIT_DEBUG=1."""
    if os.environ.get("FP8GEMM_JIT_DEBUG", "0") not in ("", "0"):
        macros = " ".join(f"{name}={value}" for name, value in kernel.macros)
        print(f"fp8gemm: {kernel.function} {macros}\n{message}", file=sys.stderr)
