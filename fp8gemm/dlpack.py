"""Tensors of other libraries in, tensors of ours out.

In: anything with `__dlpack__` (its C exchange API first, where the type has one), `__cuda_array_interface__` or
`__array_interface__`. Out: `Tensor`, which every DLPack consumer imports without a copy.
"""

import contextlib
import ctypes
import sys
import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from . import native
from .errors import DTypeError, LayoutError, OperandError, ShapeError

LEGACY_STREAM = 1  # CUDA's default stream, in the numbering of DLPack and the driver
_MAX_VERSION = (1, 1)

_api = ctypes.pythonapi
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_LEGACY, _VERSIONED = b"dltensor", b"dltensor_versioned"  # kept here: a capsule borrows its name


class Imported(NamedTuple):
    """A tensor read from another library, and what must stay alive while it is used."""

    tensor: native.Tensor
    owner: Any  # a capsule, or None for a borrowed tensor, which its owner keeps
    by_exchange: bool


def _exchange_api(x: object) -> int | None:
    if not hasattr(type(x), "__dlpack_c_exchange_api__"):  # a microsecond faster than to hear it from the library
        return None
    pointer: int | None = native.library().exchange_api(x)
    return pointer


def current_stream(x: object, device_id: int) -> int:
    """The CUDA stream on which the framework of `x` works now; the legacy default stream where it names none."""
    if (api := _exchange_api(x)) is not None:
        stream = ctypes.c_void_p()
        native.library().exchange_stream(api, native.CUDA, device_id, ctypes.byref(stream))
        return stream.value or LEGACY_STREAM
    frameworks = {base.__module__.partition(".")[0] for base in type(x).__mro__}
    if "torch" in frameworks:
        return int(sys.modules["torch"].cuda.current_stream(device_id).cuda_stream) or LEGACY_STREAM
    if "cupy" in frameworks:
        return int(sys.modules["cupy"].cuda.get_current_stream(device_id).ptr) or LEGACY_STREAM
    interface = getattr(x, "__cuda_array_interface__", None)
    if interface is not None and interface.get("stream"):
        return int(interface["stream"])
    return LEGACY_STREAM


def stream_handle(stream: object) -> int:
    """An int, or an object with `__cuda_stream__`, as a CUstream."""
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        version, handle = protocol()
        if version != 0:
            raise OperandError("stream", f"__cuda_stream__ version {version}; only 0 is understood")
        return int(handle) or LEGACY_STREAM
    if isinstance(stream, int) and not isinstance(stream, bool) and stream >= 0:
        return stream or LEGACY_STREAM
    raise OperandError("stream", f"{stream!r}; must be an int (a CUstream) or an object with __cuda_stream__")


def call_stream(stream: object, x: object, device_id: int | None) -> int | None:
    """The stream of a call: the one given, else the current one of x's framework; None for CPU tensors."""
    if device_id is None:
        if stream is not None:
            raise OperandError("stream", "given, but the tensors are on the CPU")
        return None
    native.library().check_fork()  # before the framework's own driver calls, which may hang
    return current_stream(x, device_id) if stream is None else stream_handle(stream)


def cuda_device(x: Any) -> int | None:
    """The id of the CUDA device on which the tensor lives; None if it is no CUDA tensor."""
    if _exchange_api(x) is not None:
        tensor = read(x, "").tensor
        return tensor.device_id if tensor.device_type == native.CUDA else None
    if hasattr(x, "__dlpack_device__"):
        kind, device_id = x.__dlpack_device__()
        return int(device_id) if int(kind) in (native.CUDA, 13) else None  # 13: managed memory
    return 0 if hasattr(x, "__cuda_array_interface__") else None


def read(x: object, argument: str, stream: int | None = None) -> Imported:
    """Reads a tensor's memory. On CUDA the producer orders its pending work before `stream`.

    Raises OperandError (DTypeError where the object is no tensor), naming `argument`.
    """
    tensor = native.Tensor()
    library, name = native.library(), argument.encode()
    if (api := _exchange_api(x)) is not None:
        library.read_exchange(api, x, name, ctypes.byref(tensor))
        return Imported(tensor, None, True)
    if hasattr(x, "__dlpack__"):
        with contextlib.suppress(BufferError):  # what the array interfaces may still say (ml_dtypes, read-only NumPy)
            capsule = _capsule(x, stream)
            library.read_capsule(capsule, name, ctypes.byref(tensor))
            return Imported(tensor, capsule, False)
    for attribute, device_type in (("__cuda_array_interface__", native.CUDA), ("__array_interface__", native.CPU)):
        interface = getattr(x, attribute, None)
        if interface is not None:
            _read_interface(tensor, interface, device_type, argument)
            if device_type == native.CUDA and stream and interface.get("stream"):
                library.stream_wait(tensor.device_id, stream, interface["stream"])
            return Imported(tensor, x, False)
    raise DTypeError(argument, f"{type(x).__name__} is no tensor (it has neither __dlpack__ nor an array interface)")


def _capsule(x: Any, stream: int | None) -> object:
    """The unconsumed capsule; dropping it runs the producer's deleter."""
    if stream is None:
        return _export(x)
    try:
        return _export(x, stream=stream)
    except Exception:
        if cuda_device(x) is not None:
            raise
        return _export(x)  # a CPU tensor among CUDA ones takes no stream; describe() has the words for it


def _export(x: Any, **stream: int) -> object:
    try:
        return x.__dlpack__(**stream, max_version=_MAX_VERSION)
    except TypeError:  # a producer from before DLPack 1.0
        return x.__dlpack__(**stream)


_INTERFACE_CODES = {"i": 0, "u": 1, "f": 2}


def _read_interface(tensor: native.Tensor, interface: dict[str, Any], device_type: int, argument: str) -> None:
    shape, type_text = interface["shape"], interface["typestr"]
    if len(shape) > 3:
        raise ShapeError(argument, f"rank {len(shape)}; at most 3 dimensions are supported")
    kind, size = type_text[1], int(type_text[2:])
    if kind not in _INTERFACE_CODES or (size > 1 and type_text[0] == ">"):
        raise DTypeError(argument, f"dtype {type_text!r} of the array interface; pass FP8 as uint8 and bf16 as uint16")
    for i, extent in enumerate(shape):
        if not 0 <= extent < 2**31:
            raise ShapeError(argument, f"dimension {i} is {extent}; the limit is {2**31 - 1}")
    data, read_only = interface["data"]
    if not data and 0 not in shape:
        raise LayoutError(argument, f"a null pointer with shape {tuple(shape)}")
    strides = interface.get("strides") or [step * size for step in _row_major(tuple(shape))]
    if any(s % size for s in strides):
        raise LayoutError(argument, f"strides {tuple(strides)} bytes; must be multiples of the {size}-byte element")
    tensor.data, tensor.read_only, tensor.device_type = data or None, bool(read_only), device_type
    tensor.dtype_code, tensor.dtype_bits, tensor.dtype_lanes = _INTERFACE_CODES[kind], size * 8, 1
    tensor.ndim = len(shape)
    tensor.shape[: len(shape)] = list(shape)
    tensor.stride[: len(shape)] = [s // size for s in strides]


def require_aligned(tensor: native.Tensor, argument: str) -> None:
    """Raises LayoutError if the address is no multiple of the element size, which a GPU faults on."""
    size = tensor.dtype_bits // 8
    if (tensor.data or 0) % size:
        raise LayoutError(argument, f"address {tensor.data:#x}, must be a multiple of {size} bytes")


class Held:
    """Capsules that a stream may still use: dropped once an event after their use has passed."""

    def __init__(self) -> None:
        self._held: deque[tuple[int, ctypes.c_void_p, list[object]]] = deque()

    def keep(self, device_id: int, stream: int, owners: list[object]) -> None:
        """Keeps the owners until the work that `stream` has now is done. In a capture the caller keeps them."""
        library, capturing, event = native.library(), ctypes.c_int(), ctypes.c_void_p()
        library.stream_capturing(device_id, stream, ctypes.byref(capturing))
        if not capturing.value:
            library.event_record(device_id, stream, ctypes.byref(event))
            self._held.append((device_id, event, owners))

    def release_finished(self) -> None:
        done = ctypes.c_int()
        while self._held:
            try:
                device_id, event, owners = self._held.popleft()
            except IndexError:  # another thread took the last one
                return
            done.value = 0  # what an error leaves behind is kept
            try:
                native.library().event_done(device_id, event, ctypes.byref(done))
            finally:
                if not done.value:
                    self._held.appendleft((device_id, event, owners))
            if not done.value:
                return


_held = Held()


def hold(tensors: Iterable[Imported], device_id: int, stream: int) -> None:
    """Keeps tensors that were exported for a call, not just looked at, until the stream has passed it."""
    _held.release_finished()
    if owners := [t.owner for t in tensors if t.owner is not None]:
        _held.keep(device_id, stream, owners)


class DType(NamedTuple):
    """An element type: its name, DLPack code and bits."""

    name: str
    code: int
    bits: int


E4M3, BF16, F32 = DType("float8_e4m3fn", 10, 8), DType("bfloat16", 4, 16), DType("float32", 2, 32)


def type_name(t: native.Tensor) -> str:
    """The dtype in words, as the GEMMs' errors say it."""
    return str(native.library().type_name(ctypes.byref(t)).decode())


class Tensor:
    """Memory of ours that every DLPack consumer imports without a copy: `torch.from_dlpack(t)`, `jnp.from_dlpack(t)`.

    `numpy()` views a CPU tensor (bf16 as uint16, e4m3 as uint8 bits). The memory lives as long as this object or
    anything imported from it. On CUDA, work on a stream other than the default one must be done with it by then.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: DType,
        device: tuple[int, int],
        stream: int | None,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        """`strides` in elements; row-major by default."""
        self.shape, self.dtype, self.device = shape, dtype, device
        self.strides = strides or _row_major(shape)
        view = native.Tensor(device_type=device[0], device_id=device[1], ndim=len(shape))
        view.dtype_code, view.dtype_bits, view.dtype_lanes = dtype.code, dtype.bits, 1
        view.shape[: len(shape)], view.stride[: len(shape)] = shape, self.strides
        buffer = ctypes.c_void_p()
        native.library().buffer_new(*device, self._extent() * dtype.bits // 8, stream, ctypes.byref(buffer))
        self._buffer = buffer
        weakref.finalize(self, native.library().buffer_release, buffer)
        view.data = native.library().buffer_data(buffer)
        self.view = view

    def _extent(self) -> int:
        """Elements from the first to the last in memory."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))

    def __repr__(self) -> str:
        where = "cpu" if self.device[0] == native.CPU else f"cuda:{self.device[1]}"
        return f"fp8gemm.Tensor(shape={self.shape}, dtype={self.dtype.name}, device={where!r})"

    def written(self, stream: int | None) -> None:
        """Says that the work which fills it has been given to `stream`."""
        if stream is not None:
            native.library().buffer_written(self._buffer, stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A DLPack capsule; `stream` (the consumer's, in DLPack's numbering, -1: don't) waits for our work first."""
        if copy or (dl_device is not None and tuple(dl_device) != self.device):
            raise BufferError("fp8gemm.Tensor exports its own memory only: no copy, no other device")
        if self.device[0] == native.CUDA and stream != -1:
            native.library().buffer_await(self._buffer, stream or LEGACY_STREAM)
        versioned = max_version is not None and max_version >= (1, 0)
        managed = native.library().buffer_export(self._buffer, ctypes.byref(self.view), versioned)
        if not managed:
            raise MemoryError("no host memory for a DLPack capsule")
        name = _VERSIONED if versioned else _LEGACY
        return _api.PyCapsule_New(managed, name, native.library().capsule_delete_address)

    def numpy(self) -> Any:
        """A NumPy view of a CPU tensor: float32, or the bits of bf16 (uint16) and e4m3 (uint8)."""
        import numpy as np

        if self.device[0] != native.CPU:
            raise OperandError("self", f"on cuda:{self.device[1]}; only CPU tensors have a NumPy view")
        kind: Any = {8: ctypes.c_uint8, 16: ctypes.c_uint16, 32: ctypes.c_float}[self.dtype.bits]
        memory = (kind * self._extent()).from_address(self.view.data)
        memory.keep_alive = self
        steps = tuple(step * self.dtype.bits // 8 for step in self.strides)
        return np.ndarray(self.shape, kind, memory, strides=steps)


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [1] * len(shape), 1
    for i in reversed(range(len(shape))):
        strides[i], step = step, step * max(shape[i], 1)
    return tuple(strides)
