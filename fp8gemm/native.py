"""ctypes bindings of libfp8gemm.so; the interface is documented in native/host/fp8gemm.h."""

import ctypes
import functools
from ctypes import POINTER, Structure, c_char, c_char_p, c_double, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any, ClassVar

from . import errors

ABI_VERSION = 5
CPU, CUDA = 1, 2  # DLPack device types
DENSE, CONTIGUOUS, RAGGED, MASKED = range(4)  # kinds


class Tensor(Structure):
    """A tensor's memory, as `fp8gemm_tensor`: shape and strides in elements, byte offset applied."""

    _fields_: ClassVar = [
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("dtype_code", c_int32),
        ("dtype_bits", c_int32),
        ("dtype_lanes", c_int32),
        ("ndim", c_int32),
        ("read_only", c_int32),
        ("shape", c_int64 * 3),
        ("stride", c_int64 * 3),
    ]


class Operands(Structure):
    _fields_: ClassVar = [
        ("kind", c_int32),
        ("a", Tensor),
        ("sa", Tensor),
        ("b", Tensor),
        ("sb", Tensor),
        ("d", Tensor),
        ("layout", Tensor),
    ]


class Problem(Structure):
    _fields_: ClassVar = [
        (name, c_int32)
        for name in (
            "kind",
            "device_type",
            "device_id",
            "m",
            "n",
            "k",
            "groups",
            "inputs_by_tma",
            "output_by_tma",
            "scales_by_bulk",
        )
    ]


class Plan(Structure):
    _fields_: ClassVar = [
        (name, c_int32)
        for name in (
            "tile_m",
            "tile_n",
            "stages",
            "cluster_m",
            "cluster_n",
            "depth",
            "split",
            "slices",
            "swap_ab",
            "one_tile",
            "shared_bytes",
            "threads",
            "num_sms",
            "raster",
        )
    ] + [("b_policy", c_uint64)]


class CpuPlan(Structure):
    _fields_: ClassVar = [("threads", c_int32), ("tile_n", c_int32)]


class Key(Structure):
    """What a call is looked up by; zero where it makes no difference."""

    _fields_: ClassVar = [
        (name, c_int32)
        for name in (
            "kind",
            "device_type",
            "device_id",
            "reference",
            "m",
            "n",
            "k",
            "groups",
            "expected_m",
            "row_scales",
            "num_sms",
            "batch_invariant",
        )
    ]


class Entry(Structure):
    """What the calls of a key do. Never changes once it is in the table."""

    _fields_: ClassVar = [
        ("key", Key),
        ("kernel", c_void_p),
        ("plan", Plan),
        ("cpu_plan", CpuPlan),
        ("from_store", c_int32),
    ]


class Device(Structure):
    _fields_: ClassVar = [("name", c_char * 96)] + [
        (name, c_int32) for name in ("major", "minor", "sms", "l2_bytes", "shared_bytes", "clock_khz")
    ]
    _fields_ += [("memory_bandwidth", c_double)]


class _Error(Structure):
    _fields_: ClassVar = [("status", c_int32), ("argument", c_char * 32), ("message", c_char * 480)]


_ERRORS: dict[int, type[errors.OperandError]] = {
    1: errors.DTypeError,
    2: errors.ShapeError,
    3: errors.LayoutError,
    4: errors.DeviceError,
    7: errors.OperandError,
}
_PLAIN_ERRORS: dict[int, type[errors.Fp8GemmError]] = {
    5: errors.BackendUnavailable,
    6: errors.DriverError,
    8: errors.NotPrepared,
}

_P, _S = POINTER, c_void_p  # _S: a CUstream
_SIGNATURES: dict[str, list[Any]] = {
    "buffer_new": [c_int, c_int, c_size_t, _S, _P(c_void_p)],
    "buffer_written": [c_void_p, _S],
    "buffer_await": [c_void_p, _S],
    "describe": [_P(Operands), _P(Problem)],
    "put": [_P(Entry)],
    "run": [_P(Entry), _P(Operands), _P(Problem), _S],
    "limit_sms": [c_int, c_int],
    "check_fork": [],
    "driver_version": [_P(c_int)],
    "device_count": [_P(c_int)],
    "device_read": [c_int, _P(Device)],
    "kernel_load": [c_int, c_char_p, c_size_t, c_char_p, c_int, _P(c_void_p)],
    "require_no_capture": [c_int, _S],
    "launch_gemm": [c_void_p, _P(Operands), _P(Problem), _P(Plan), _S],
    "launch_reference": [c_void_p, _P(Operands), _P(Problem), _S],
    "launch_cast": [c_void_p, c_int, _P(Tensor), _P(Tensor), _P(Tensor), _S],
    "launch_copy": [c_void_p, _P(Tensor), _P(Tensor), _S],
    "copy_to_host": [c_int, _S, c_void_p, c_size_t, c_void_p],
    "stream_wait": [c_int, _S, _S],
    "stream_capturing": [c_int, _S, _P(c_int)],
    "event_record": [c_int, _S, _P(c_void_p)],
    "event_done": [c_int, c_void_p, _P(c_int)],
    "cpu_gemm": [_P(Operands), _P(Problem), _P(CpuPlan)],
    "cpu_copy": [_P(Tensor), _P(Tensor)],
    "cpu_cast": [c_int, _P(Tensor), _P(Tensor), _P(Tensor), c_int],
}
_WITH_GIL: dict[str, list[Any]] = {  # these call back into the interpreter
    "read_capsule": [ctypes.py_object, c_char_p, _P(Tensor)],
    "read_exchange": [c_void_p, ctypes.py_object, c_char_p, _P(Tensor)],
    "exchange_stream": [c_void_p, c_int, c_int, _P(c_void_p)],
}
_WITH_GIL_PLAIN: dict[str, tuple[Any, list[Any]]] = {
    "exchange_api": (c_void_p, [ctypes.py_object]),
    "python_call": (ctypes.py_object, [ctypes.py_object]),
}
_PLAIN: dict[str, tuple[Any, list[Any]]] = {  # no status
    "abi_version": (c_int, []),
    "last_error": (_P(_Error), []),
    "type_name": (c_char_p, [_P(Tensor)]),
    "buffer_data": (c_void_p, [c_void_p]),
    "buffer_release": (None, [c_void_p]),
    "buffer_export": (c_void_p, [c_void_p, _P(Tensor), c_int]),
    "cpu_features": (c_char_p, []),
    "bucket": (c_int32, [c_int64]),
    "make_key": (None, [_P(Problem), c_int64, c_int, _P(Key)]),
    "find": (_P(Entry), [_P(Key)]),
    "entries": (c_size_t, [_P(Entry), _P(c_uint64), c_size_t]),
    "forget_plans": (None, []),
    "set_batch_invariant": (None, [c_int]),
    "batch_invariant": (c_int, []),
    "sm_limit": (c_int, [c_int]),
}


class Library:
    """The loaded library: `library.describe(...)` calls `fp8gemm_describe` and raises its error, if any."""

    def __init__(self, path: Path) -> None:
        free, locked = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        for library, plain in ((free, _PLAIN), (locked, _WITH_GIL_PLAIN)):
            for name, (result, arguments) in plain.items():
                function = getattr(library, f"fp8gemm_{name}")
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)
        self.capsule_delete_address = ctypes.cast(free.fp8gemm_capsule_delete, c_void_p)
        found = self.abi_version()
        if found != ABI_VERSION:
            raise ImportError(f"{path} has ABI version {found}, this package needs {ABI_VERSION}; reinstall fp8gemm")
        for library, signatures in ((free, _SIGNATURES), (locked, _WITH_GIL)):
            for name, arguments in signatures.items():
                function = getattr(library, f"fp8gemm_{name}")
                function.restype, function.argtypes = self._raise_failure, arguments
                setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:  # for type checkers: the functions set above
        raise AttributeError(name)

    def _raise_failure(self, status: int) -> None:
        if status == 0:
            return
        error = self.last_error().contents
        argument, message = error.argument.decode(), error.message.decode()
        if status in _ERRORS:
            raise _ERRORS[status](argument, message)
        raise _PLAIN_ERRORS.get(status, errors.Fp8GemmError)(message)


@functools.cache
def library() -> Library:
    """Loads libfp8gemm.so from beside this file; CUDA is not touched."""
    path = Path(__file__).with_name("libfp8gemm.so")
    if not path.exists():
        raise ImportError(f"{path} is missing; build it with `make native` or install with `pip install .`")
    return Library(path)
