"""Quantisers: bf16, fp16 or fp32 to e4m3 with FP32 scales, as DeepSeek-V3 does it (arXiv 2412.19437, section 3.3).

    s = max(amax, 1e-4) / 448      per block, in FP32; 448 is the largest e4m3
    q = e4m3(x / s)                IEEE division in FP32, round to nearest even, saturating

A NaN makes its whole block NaN.
"""

from typing import Any

from . import backends, native
from .dlpack import E4M3, F32, Tensor, call_stream, cuda_device, hold, read, require_aligned, type_name
from .errors import DeviceError, DTypeError, LayoutError, OperandError, ShapeError
from .layout import ceil_div

_INPUT_TYPES = {(4, 16): 0, (1, 16): 0, (2, 16): 1, (2, 32): 2}  # DLPack code, bits: bf16 (or uint16), fp16, fp32


def per_token_cast_to_fp8(x: Any, out: tuple[Any, Any] | None = None, *, stream: Any = None) -> tuple[Any, Any]:
    """Quantises activations in blocks of 1 x 128.

    Args:
        x: (M, K) bfloat16 (or uint16 holding its bits), float16 or float32, rows contiguous.
        out: (q, s) to write: q (M, K) float8_e4m3fn or uint8, s (M, ceil(K / 128)) float32 of any strides.
        stream: as in `gemm_fp8_fp8_bf16_nt`.

    Returns (q, s): `out`, or two new `fp8gemm.Tensor`s. Raises DTypeError, ShapeError, LayoutError, DeviceError.
    """
    return _cast(False, x, out, stream)


def per_block_cast_to_fp8(x: Any, out: tuple[Any, Any] | None = None, *, stream: Any = None) -> tuple[Any, Any]:
    """Quantises weights in blocks of 128 x 128: x (N, K) -> q (N, K), s (ceil(N / 128), ceil(K / 128)).

    Otherwise as `per_token_cast_to_fp8`.
    """
    return _cast(True, x, out, stream)


def _cast(per_block: bool, x: Any, out: tuple[Any, Any] | None, stream: Any) -> tuple[Any, Any]:
    device_id = cuda_device(x)
    handle = call_stream(stream, x, device_id)
    tensors = {"x": read(x, "x", handle)}
    view = tensors["x"].tensor
    input_type = _INPUT_TYPES.get((view.dtype_code, view.dtype_bits))
    if input_type is None:
        raise DTypeError("x", f"dtype {type_name(view)}, expected bfloat16 (or uint16), float16 or float32")
    if view.ndim != 2:
        raise ShapeError("x", f"rank {view.ndim}; must be 2")
    if view.shape[0] and view.shape[1] > 1 and view.stride[1] != 1:
        raise LayoutError("x", f"stride {view.stride[1]} of the last dimension, which must be contiguous (stride 1)")
    require_aligned(view, "x")
    rows, columns = view.shape[0], view.shape[1]
    shape = (ceil_div(rows, 128) if per_block else rows, ceil_div(columns, 128))
    if out is None:
        device = (view.device_type, view.device_id)
        out = Tensor((rows, columns), E4M3, device, handle), Tensor(shape, F32, device, handle)
        q, s = out[0].view, out[1].view
    else:
        if not isinstance(out, (tuple, list)) or len(out) != 2:
            raise OperandError("out", f"{type(out).__name__}; must be a pair (values, scales)")
        tensors |= {name: read(t, name, handle) for name, t in zip(("q", "s"), out, strict=True)}
        q, s = tensors["q"].tensor, tensors["s"].tensor
        _check_output(q, "q", (rows, columns), {(10, 8), (1, 8)}, view)
        _check_output(s, "s", shape, {(2, 32)}, view)
    if handle is None:
        backends.cpu_cast(per_block, view, q, s)
    else:
        backends.cuda_cast(per_block, input_type, view, q, s, handle)
        for tensor in out:
            if isinstance(tensor, Tensor):
                tensor.written(handle)
        hold(tensors.values(), view.device_id, handle)
    return out


def _check_output(
    t: native.Tensor, name: str, shape: tuple[int, int], types: set[tuple[int, int]], x: native.Tensor
) -> None:
    if (t.dtype_code, t.dtype_bits) not in types:
        wanted = "float8_e4m3fn or uint8" if name == "q" else "float32"
        raise DTypeError(name, f"dtype {type_name(t)}, expected {wanted}")
    if tuple(t.shape[: t.ndim]) != shape:
        raise ShapeError(name, f"shape {tuple(t.shape[: t.ndim])}, expected {shape}")
    if t.read_only:
        raise LayoutError(name, "read-only; it is written")
    if name == "q" and shape[0] and shape[1] > 1 and t.stride[1] != 1:
        raise LayoutError(name, f"stride {t.stride[1]} of the last dimension, which must be contiguous (stride 1)")
    require_aligned(t, name)
    if (t.device_type, t.device_id) != (x.device_type, x.device_id):
        raise DeviceError(name, "on another device than x")
