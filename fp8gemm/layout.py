"""Layouts of scales and groups, with DeepGEMM's names."""

from typing import Any

from . import backends
from .dlpack import F32, Tensor, call_stream, cuda_device, hold, read, require_aligned, type_name
from .errors import DTypeError, OperandError, ShapeError

M_ALIGNMENT = 128


def ceil_div(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


def get_m_alignment_for_contiguous_layout() -> int:
    """Rows to whose multiples the groups of the contiguous form are aligned."""
    return M_ALIGNMENT


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """`x` elements rounded up to a multiple of the 16 bytes that TMA wants of a stride."""
    if element_size not in (1, 2, 4, 8, 16):
        raise OperandError("element_size", f"{element_size}; must divide 16")
    per_unit = 16 // element_size
    return ceil_div(x, per_unit) * per_unit


def get_col_major_tma_aligned_tensor(x: Any, *, stream: Any = None) -> Tensor:
    """A copy of scales (..., M, ceil(K / 128)) float32 with rows fastest and a leading dimension of a multiple of 4.

    The GEMMs here read scales of any strides, so nothing in this library needs it; it is for code written for DeepGEMM.
    Raises DTypeError or ShapeError for anything but float32 of rank 2 or 3.
    """
    device_id = cuda_device(x)
    handle = call_stream(stream, x, device_id)
    source = read(x, "x", handle)
    view = source.tensor
    if (view.dtype_code, view.dtype_bits) != (F32.code, F32.bits):
        raise DTypeError("x", f"dtype {type_name(view)}, expected float32")
    if view.ndim not in (2, 3):
        raise ShapeError("x", f"rank {view.ndim}; must be 2 or 3")
    require_aligned(view, "x")
    shape = tuple(view.shape[: view.ndim])
    leading = get_tma_aligned_size(shape[-2], 4)
    strides = (leading * shape[-1], 1, leading)[-view.ndim :]
    copy = Tensor(shape, F32, (view.device_type, view.device_id), handle, strides)
    if handle is None:
        backends.cpu_copy(view, copy.view)
    else:
        backends.cuda_copy(view, copy.view, handle)
        copy.written(handle)
        hold([source], view.device_id, handle)
    return copy
