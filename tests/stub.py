"""GPUs that are not there: a stub of the CUDA driver, and tensors with DLPack's C exchange API that live on them.

A test under `on_stub_gpus` runs in a new interpreter which finds the stub instead of a driver.
"""

import ctypes
import functools
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from dlpack_structs import DELETER, LEGACY, VERSIONED, DLTensor, Legacy, Versioned

import fp8gemm
from fp8gemm import dlpack, native

HERE = Path(__file__).parent
ROOT = Path(fp8gemm.__file__).parents[1]
DRIVER, TENSORS = "libcuda.so.1", "libstub_tensors.so"
PATIENCE = 60  # seconds until a test counts as hanging


def build(folder: Path) -> Path:
    """Compiles both stubs into the folder, and puts an nvcc beside them that compiles nothing."""
    for source, library in (("stub_driver.cpp", DRIVER), ("stub_tensors.cpp", TENSORS)):
        command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-o", str(folder / library), str(HERE / source)]
        subprocess.run(command, check=True)
    nvcc = folder / "nvcc"
    cubin = r"""{ printf '\177ELF\002'; head -c 59 /dev/zero; echo "$@"; } > kernel.cubin"""  # without sections
    nvcc.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo V13.0.0; else {cubin}; fi\n')
    nvcc.chmod(0o755)
    return folder


def environment(folder: Path, **more: str) -> dict[str, str]:
    """That of a process which is to find the stubs."""
    settings = {
        "STUBS": str(folder),
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
        "FP8GEMM_COMPILER": str(folder / "nvcc"),
        "FP8GEMM_CACHE_DIR": str(folder / "cache"),
    }
    return os.environ | settings | more


def on_stub_gpus(test: Callable[[], object]) -> Callable[[Path], None]:
    """Runs the test in a new interpreter, once the fixture `stub` has built what it needs."""

    @functools.wraps(test)
    def run(stub: Path) -> None:
        code = f"import {test.__module__} as module; module.{test.__name__}.__wrapped__()"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env=environment(stub),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("stub", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    )
    return run


def quiet() -> None:
    """No more of what the stub says of streams and memory."""
    flag("stub_quiet").value = 1


@functools.cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL(DRIVER)


@functools.cache
def _tensors() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(os.environ["STUBS"]) / TENSORS))


def set_stream(device_id: int, stream: int) -> None:
    """Makes it the current stream of the tensors' framework."""
    _tensors().stub_set_stream(device_id, ctypes.c_void_p(stream))


def flag(name: str) -> ctypes.c_int:
    """A setting or counter of the stub driver."""
    return ctypes.c_int.in_dll(driver(), name)


def modules() -> int:
    """Kernels that were loaded."""
    return flag("stub_modules").value


def launches(since: int = 0, until: int | None = None) -> list[dict[str, Any]]:
    """What was launched, oldest first; the latest few thousand are known."""
    text = ctypes.create_string_buffer(4096)
    found = []
    for i in range(since, driver().stub_launch_count() if until is None else until):
        driver().stub_launch(ctypes.c_long(i), text, ctypes.c_size_t(len(text)))
        found.append(json.loads(text.value))
    return found


class Record(ctypes.Structure):
    """A tensor, as stub_tensors.cpp has it."""

    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("_shape", ctypes.c_void_p),
        ("_strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("shape", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
        ("fails", ctypes.c_int32),
        ("no_strides", ctypes.c_int32),
    ]


E4M3, BF16, F32, I32 = (10, 8), (4, 16), (2, 32), (0, 32)
_next_address = 0x7000_0000_0000


def _address(size: int) -> int:
    global _next_address
    found = _next_address
    _next_address += (size // 4096 + 2) * 4096
    return found


class Tensor(bytes):
    """A tensor on a stub GPU, whose memory nobody may touch. Its address is its own, unless `data` says another."""

    if "STUBS" in os.environ:
        _capsule_name = b"dlpack_exchange_api"
        ctypes.pythonapi.PyCapsule_New.restype = ctypes.py_object
        ctypes.pythonapi.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        __dlpack_c_exchange_api__ = ctypes.pythonapi.PyCapsule_New(
            ctypes.addressof(ctypes.c_char.in_dll(_tensors(), "stub_exchange_api")), _capsule_name, None
        )

    def __new__(
        cls,
        shape: Sequence[int],
        dtype: tuple[int, int],
        device: int = 0,
        strides: Sequence[int] | None = None,
        **fields: Any,
    ) -> "Tensor":
        """`strides` in elements, row-major by default; `fields` override those of the record."""
        if strides is None:
            strides, step = [], 1
            for extent in reversed(shape):
                strides.insert(0, step)
                step *= max(extent, 1)
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        record = Record(device_type=2, device_id=device, ndim=len(shape), lanes=1)
        record.code, record.bits = dtype
        record.shape[: len(shape)] = list(shape)
        record.strides[: len(shape)] = list(strides)
        record.data = fields.pop("data", None) or _address(max(extent, 0) * dtype[1] // 8)
        for name, value in fields.items():
            setattr(record, name, value)
        return super().__new__(cls, bytes(record))

    @property
    def address(self) -> int:
        return int(Record.from_buffer_copy(self).data)


def record(tensor: Tensor) -> Record:
    return Record.from_buffer_copy(tensor)


def of_record(changed: Record) -> Tensor:
    return bytes.__new__(Tensor, bytes(changed))


class Managed:
    """The same tensor, exported by capsules. Nothing is deleted but by the deleter, which counts.

    `fields` are a capsule's own: `versioned`, `version`, `flags`, `name`.
    """

    def __init__(self, tensor: Tensor, **fields: Any) -> None:
        self.tensor = tensor
        self.fields: dict[str, Any] = {"versioned": False, "version": (1, 0), "flags": 0, "name": None} | fields
        self.made, self.streams = 0, list[Any]()
        self._deleted = ctypes.c_int64()
        self._alive: list[Any] = []

    @property
    def deleted(self) -> int:
        return self._deleted.value

    def __dlpack_device__(self) -> tuple[int, int]:
        record = Record.from_buffer_copy(self.tensor)
        return record.device_type, record.device_id

    def __dlpack__(self, stream: int | None = None, max_version: object = None) -> object:
        record = Record.from_buffer_copy(self.tensor)
        inner = DLTensor.from_buffer_copy(self.tensor)
        inner.shape = (ctypes.c_int64 * 4)(*record.shape)
        inner.strides = None if record.no_strides else (ctypes.c_int64 * 4)(*record.strides)
        versioned = self.fields["versioned"]
        name = self.fields["name"] or (VERSIONED if versioned else LEGACY)
        deleter = ctypes.cast(_tensors()["stub_delete_versioned" if versioned else "stub_delete"], DELETER)
        context = ctypes.addressof(self._deleted)
        export: Any = Legacy(inner, context, deleter)
        if versioned:
            export = Versioned(*self.fields["version"], context, deleter, self.fields["flags"], inner)
        self._alive.append(export)
        self.made += name in (LEGACY, VERSIONED)  # nobody deletes what has another name
        self.streams.append(stream)
        return dlpack._api.PyCapsule_New(ctypes.addressof(export), name, native.library().capsule_delete_address)
