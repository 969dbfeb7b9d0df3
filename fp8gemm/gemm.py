"""The GEMMs. Names and operands follow DeepGEMM's; tensors may come from any framework (see `fp8gemm.dlpack`)."""

import ctypes
from collections.abc import Callable
from typing import Any

from . import backends, native, planner
from .dlpack import BF16, Tensor, call_stream, cuda_device, hold, read
from .errors import OperandError
from .layout import M_ALIGNMENT
from .problem import describe

Matrix = tuple[Any, Any]  # (e4m3 values, float32 scales)
_LAYOUT_NAMES = {native.CONTIGUOUS: "m_indices", native.RAGGED: "group_ends", native.MASKED: "masked_m"}


def gemm_fp8_fp8_bf16_nt(
    lhs: Matrix, rhs: Matrix, d: Any = None, *, stream: Any = None, batch_invariant: bool | None = None
) -> Any:
    """D = A B' with fine-grained scales, FP32 accumulation and a bf16 result.

        D[m, n] = sum over kb of sa[m, kb] * sb[n // 128, kb] * (A[m, 128 kb : 128 (kb + 1)] . B[n, ...])

    Args:
        lhs: (a, sa): a (M, K) float8_e4m3fn, sa (M, ceil(K / 128)) float32 of any strides.
        rhs: (b, sb): b (N, K) float8_e4m3fn, sb (ceil(N / 128), ceil(K / 128)) float32 of any strides.
        d: (M, N) bfloat16, written; None allocates it and returns an `fp8gemm.Tensor`.
        stream: CUstream as an int, or an object with `__cuda_stream__`; by default the current stream of the
            framework of d (of a, without d).
        batch_invariant: take only plans that sum K in ascending order, so that a row's bits depend neither on M nor on
            the plan; None: as `set_batch_invariant` says. Slower where tiles are few and other plans split K: on an
            H200, DeepSeek-V3's layers at M = 8 .. 8192, 1.03 times in the geometric mean, 1.32 times at most.

    uint8 is taken as e4m3 and uint16 as bfloat16. K is a multiple of 16; the last dimension of a, b and d is
    contiguous. M = 0 and K = 0 are fine. Returns d.

    Raises:
        DTypeError, ShapeError, LayoutError, DeviceError: an operand is wrong; nothing was written.
        BackendUnavailable: CUDA tensors that cannot run here.
        NotPrepared: the kernel is not loaded yet and the stream is being captured.
    """
    return _launch(native.DENSE, lhs, rhs, d, None, stream, batch_invariant, 0, False)


def m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(
    lhs: Matrix,
    rhs: Matrix,
    d: Any = None,
    m_indices: Any = None,
    *,
    group_ends: Any = None,
    expected_m: int = 0,
    validate: bool = False,
    stream: Any = None,
    batch_invariant: bool | None = None,
) -> Any:
    """Rows of A, group after group, each group times its own weight: the forward pass of a mixture of experts.

    Args:
        lhs: (a, sa): a (M_sum, K) float8_e4m3fn, sa (M_sum, ceil(K / 128)) float32.
        rhs: (b, sb): b (G, N, K) float8_e4m3fn, sb (G, ceil(N / 128), ceil(K / 128)) float32.
        d: (M_sum, N) bfloat16, or None.
        m_indices: (M_sum,) int32 on the device: each row's group. Groups start at multiples of
            `get_m_alignment_for_contiguous_layout()`; padding after a group's rows is -1 and leaves d as it was.
        group_ends: instead of m_indices, (G,) int32 on the device: where each group ends. Groups of any size, also 0,
            back to back without padding. Rows after the last end leave d as it was.
        expected_m: the host's guess of a group's rows, for the choice of a plan only.
        validate: read the indices back (this waits for the stream) and raise OperandError if they are nonsense, which
            otherwise never reaches memory outside the operands but gives meaningless rows.

    Raises as `gemm_fp8_fp8_bf16_nt`; OperandError unless exactly one of m_indices and group_ends is given.
    """
    if (m_indices is None) == (group_ends is None):
        given = "neither" if m_indices is None else "both"
        raise OperandError("m_indices", f"{given} of m_indices and group_ends given; exactly one is needed")
    kind = native.CONTIGUOUS if group_ends is None else native.RAGGED
    layout = m_indices if group_ends is None else group_ends
    return _launch(kind, lhs, rhs, d, layout, stream, batch_invariant, expected_m, validate)


def m_grouped_gemm_fp8_fp8_bf16_nt_masked(
    lhs: Matrix,
    rhs: Matrix,
    d: Any,
    masked_m: Any,
    expected_m: int = 0,
    *,
    validate: bool = False,
    stream: Any = None,
    batch_invariant: bool | None = None,
) -> Any:
    """Groups of up to Mmax rows, of which the first `masked_m[g]` count: decoding in a CUDA graph.

    Args:
        lhs: (a, sa): a (G, Mmax, K) float8_e4m3fn, sa (G, Mmax, ceil(K / 128)) float32.
        rhs: (b, sb): b (G, N, K) float8_e4m3fn, sb (G, ceil(N / 128), ceil(K / 128)) float32.
        d: (G, Mmax, N) bfloat16, or None. Rows past masked_m are left as they were.
        masked_m: (G,) int32 on the device, read there.
        expected_m: the host's guess of a group's rows, as DeepGEMM's callers give it (1.2 times the mean), for the
            choice of a plan only; 0: Mmax.
        validate: as in the contiguous form.
    """
    return _launch(native.MASKED, lhs, rhs, d, masked_m, stream, batch_invariant, expected_m, validate)


def _open_library(*call: Any) -> Any:
    """What `_launch` is until the first call, which loads the library.

    From then on it is the library's builtin (native/host/call.cpp), which makes the common call without running Python
    and hands every other one to `_call`.
    """
    global _launch
    _launch = native.library().python_call(_call)
    return _launch(*call)


_launch: Callable[..., Any] = _open_library


def _call(
    kind: int,
    lhs: Matrix,
    rhs: Matrix,
    d: Any,
    layout: Any,
    stream: Any,
    batch_invariant: bool | None,
    expected_m: int,
    validate: bool,
) -> Any:
    """Any call: checks everything, and raises what is wrong in words."""
    (a, sa), (b, sb) = _pair(lhs, "lhs"), _pair(rhs, "rhs")
    if isinstance(expected_m, bool) or not isinstance(expected_m, int) or expected_m < 0:
        raise OperandError("expected_m", f"{expected_m!r}; must be an int of at least 0")
    planner.check_invariance(batch_invariant)
    device_id = cuda_device(a)
    handle = call_stream(stream, a if d is None else d, device_id)

    given = {"a": a, "sa": sa, "b": b, "sb": sb}
    tensors = {name: read(x, name, handle) for name, x in given.items()}
    operands = native.Operands(kind=kind, **{name: t.tensor for name, t in tensors.items()})
    operands.d.ndim = operands.layout.ndim = -1
    if layout is not None or kind != native.DENSE:
        tensors["layout"] = read(layout, _LAYOUT_NAMES[kind], handle)
        operands.layout = tensors["layout"].tensor
    if d is not None:
        tensors["d"] = read(d, "d", handle)
        operands.d = tensors["d"].tensor
    found = describe(operands)

    if validate and kind != native.DENSE:
        _validate(operands, found, handle)
    if d is None:
        shape = (found.groups, found.m, found.n) if kind == native.MASKED else (found.m, found.n)
        d = Tensor(shape, BF16, (found.device_type, found.device_id), handle)
        operands.d = d.view
    if found.m:
        entry = planner.planned(planner.make_key(found, expected_m, batch_invariant), handle)
        backends.run(entry, operands, found, handle)
    if handle is not None:
        if isinstance(d, Tensor):
            d.written(handle)
        hold(tensors.values(), found.device_id, handle)
    return d


def _pair(matrix: Any, name: str) -> Matrix:
    if isinstance(matrix, (tuple, list)) and len(matrix) == 2:
        return matrix[0], matrix[1]
    raise OperandError(name, f"{type(matrix).__name__}; must be a pair (values, scales)")


def _validate(operands: native.Operands, found: native.Problem, stream: int | None) -> None:
    """Reads the group layout back and raises OperandError if it is nonsense."""
    layout, name = operands.layout, _LAYOUT_NAMES[found.kind]
    values = (ctypes.c_int32 * layout.shape[0])()
    if stream is None:
        ctypes.memmove(values, layout.data, ctypes.sizeof(values))
    elif len(values):
        native.library().copy_to_host(found.device_id, stream, layout.data, ctypes.sizeof(values), values)
    if found.kind == native.MASKED:
        _require_range(name, values, 0, found.m)
    elif found.kind == native.RAGGED:
        _require_range(name, values, 0, found.m)
        for g in range(1, len(values)):
            if values[g] < values[g - 1]:
                raise OperandError(name, f"{values[g]} at {g} after {values[g - 1]}; ends must not decrease")
    else:
        _require_range(name, values, -1, found.groups - 1)
        for row in range(1, len(values)):
            before, here = values[row - 1], values[row]
            if here != before and here != -1 and row % M_ALIGNMENT:
                raise OperandError(name, f"{here} begins at row {row}; groups begin at multiples of {M_ALIGNMENT}")


def _require_range(name: str, values: Any, least: int, most: int) -> None:
    for i, value in enumerate(values):
        if not least <= value <= most:
            raise OperandError(name, f"{value} at {i}; allowed are {least} to {most}")
