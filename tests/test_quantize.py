"""The quantisers through the public interface, bit for bit against NumPy and ml_dtypes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from references import BF16, F32, SCALE_LAYOUTS, Array, Rng, ceil_div, fenced, fresh_rng, in_child, padded, quantise

import fp8gemm
from fp8gemm import DeviceError, DTypeError, LayoutError, OperandError, ShapeError

CASTS: dict[str, tuple[Callable[..., Any], int]] = {
    "per_token": (fp8gemm.per_token_cast_to_fp8, 1),
    "per_block": (fp8gemm.per_block_cast_to_fp8, 128),
}
TYPES = [BF16, np.dtype(np.float16), F32]
each_cast = pytest.mark.parametrize(("cast", "height"), CASTS.values(), ids=CASTS)
each_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


def passed(x: Array) -> Array:
    """The array as the library takes it: bf16 by its bits."""
    return x.view(np.uint16) if x.dtype == BF16 else x


def normal(rng: Rng, shape: tuple[int, int], dtype: Any, binades: float = 8) -> Array:
    x = rng.standard_normal(shape) * np.exp2(rng.uniform(-binades / 2, binades / 2, shape))
    return x.astype(dtype)


def check(cast: Callable[..., Any], height: int, x: Array) -> None:
    """Two tensors of ours, and two arrays by `out=`, poisoned before."""
    codes, scales = quantise(x, height)
    q, s = cast(passed(x))
    assert isinstance(q, fp8gemm.Tensor)
    assert isinstance(s, fp8gemm.Tensor)
    assert (q.dtype.name, q.shape, s.dtype.name, s.shape) == ("float8_e4m3fn", x.shape, "float32", scales.shape)
    np.testing.assert_array_equal(s.numpy(), scales)
    np.testing.assert_array_equal(q.numpy(), codes)
    out = np.full(x.shape, 0x55, np.uint8), np.full(scales.shape, -1, np.float32)
    assert cast(passed(x), out) is out
    np.testing.assert_array_equal(out[1], scales)
    np.testing.assert_array_equal(out[0], codes)


@each_type
@each_cast
@pytest.mark.parametrize("shape", [(1, 1), (1, 128), (3, 129), (128, 128), (129, 300), (300, 1040)])
def test_sizes(rng: Rng, cast: Callable[..., Any], height: int, dtype: Any, shape: tuple[int, int]) -> None:
    check(cast, height, normal(rng, shape, dtype))


@each_cast
@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (5, 0)])
def test_empty(cast: Callable[..., Any], height: int, shape: tuple[int, int]) -> None:
    q, s = cast(np.zeros(shape, np.float32))
    assert (q.shape, s.shape) == (shape, (ceil_div(shape[0], height), ceil_div(shape[1], 128)))
    out = np.zeros(q.shape, np.uint8), np.zeros(s.shape, np.float32)
    assert cast(np.zeros(shape, np.float32), out) is out


@each_type
@each_cast
def test_special_values(rng: Rng, cast: Callable[..., Any], height: int, dtype: Any) -> None:
    """Zeros of both signs, the least scale, subnormals, the largest numbers, infinities, NaN, each in its block."""
    least, most = ({BF16: (2.0**-133, 2.0**127), F32: (2.0**-149, 2.0**127)}).get(dtype, (2.0**-24, 32768.0))
    factors = (0.0, -0.0, 1e-4, 1e-5, least, 2.0**-14, most)
    x = rng.uniform(-1, 1, (130, 128 * (len(factors) + 3)))
    with np.errstate(all="ignore"):
        for j, factor in enumerate(factors):
            x[:, j * 128 : (j + 1) * 128] *= factor
        x = x.astype(dtype)
    x[3, -3 * 128 + 9], x[3, -2 * 128 + 9], x[3, -128 + 9] = np.inf, -np.inf, np.nan
    check(cast, height, x)
    q, s = (t.numpy() for t in cast(passed(x)))
    assert np.isnan(s[3 // height, -1])
    assert (q[3, -128:] == 0x7F).all()
    assert np.isinf(s[3 // height, -3:-1]).all()
    assert s[0, 0] == np.float32(1e-4) / np.float32(448)
    if height == 1:
        assert np.isfinite(s[4:]).all()


@each_cast
def test_largest_finite_numbers(cast: Callable[..., Any], height: int) -> None:
    """A block's largest magnitude becomes 448, whatever it was; nothing overflows to NaN."""
    for dtype in TYPES:
        bits = np.uint32(0x7F7FFFFF) if dtype == F32 else np.uint16(0x7F7F if dtype == BF16 else 0x7BFF)
        x = np.full((2, 130), bits).view(dtype)
        x[1] = -x[1]
        q, _ = (t.numpy() for t in cast(passed(x)))
        assert (q[0] == 0x7E).all()
        assert (q[1] == 0xFE).all()
        check(cast, height, x)


@given(st.data())
def test_any_bits_and_strides(data: st.DataObject) -> None:
    draw = data.draw
    cast, height = draw(st.sampled_from(list(CASTS.values())))
    dtype = draw(st.sampled_from(TYPES))
    rng = fresh_rng(draw(st.integers(0, 2**32)))
    rows, k = draw(st.integers(1, 150)), draw(st.integers(1, 400))
    x = rng.integers(0, 256, (rows, k * dtype.itemsize), dtype=np.uint8).view(dtype)
    limit = draw(st.sampled_from([np.inf, 1e4, 1e-3]))
    with np.errstate(invalid="ignore"):
        x[~(np.abs(x.astype(np.float32)) < limit)] = 1
    codes, scales = quantise(x, height)
    q = padded(np.full((rows, k), 0x55, np.uint8), draw(st.integers(0, 9)), 0x55)
    s = draw(st.sampled_from(SCALE_LAYOUTS))(np.full(scales.shape, -1, np.float32))
    strided = padded(x, draw(st.integers(0, 9)), 0)
    if draw(st.booleans()):
        strided, (codes, scales) = strided[::-1], quantise(x[::-1], height)
    cast(passed(strided), (q, s))
    np.testing.assert_array_equal(s, scales)
    np.testing.assert_array_equal(q, codes)
    if q.base is not None:
        assert (q.base[:, k:] == 0x55).all()


@pytest.mark.parametrize("at_end", [False, True])
@each_cast
def test_nothing_beyond_the_tensors_is_touched(rng: Rng, cast: Callable[..., Any], height: int, at_end: bool) -> None:
    for dtype in TYPES:
        x = normal(rng, (131, 141), dtype)
        codes, scales = quantise(x, height)
        source = fenced(passed(x), at_end)
        out = fenced(np.full(codes.shape, 0x55, np.uint8), at_end), fenced(np.zeros_like(scales), at_end)

        def body(
            source: Array = source, out: tuple[Array, Array] = out, expected: tuple[Array, Array] = (codes, scales)
        ) -> None:
            cast(source, out)
            for ours, right in zip(out, expected, strict=True):
                np.testing.assert_array_equal(ours, right)

        in_child(body)


def good() -> dict[str, Any]:
    return {
        "x": np.ones((5, 200), np.float32),
        "q": np.full((5, 200), 0x55, np.uint8),
        "s": np.full((5, 2), -1, np.float32),
    }


def misaligned(shape: tuple[int, ...], dtype: Any) -> Array:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64 + 1
    array: Array = memory[start : start + size].view(dtype).reshape(shape)
    return array


ERRORS: list[tuple[str, Any, type[OperandError], str]] = [
    ("x", [[1.0]], DTypeError, "list is no tensor"),
    ("x", np.ones((5, 200)), DTypeError, "dtype float64, expected bfloat16"),
    ("x", np.ones((5, 200), np.int32), DTypeError, "dtype int32"),
    ("x", np.ones((5, 200), np.uint8), DTypeError, "dtype uint8"),
    ("x", np.ones(200, np.float32), ShapeError, "rank 1; must be 2"),
    ("x", np.ones((1, 5, 200), np.float32), ShapeError, "rank 3; must be 2"),
    ("x", np.ones((200, 5), np.float32).T, LayoutError, "stride 5 of the last dimension"),
    ("x", misaligned((5, 200), np.float32), LayoutError, "multiple of 4 bytes"),
    ("x", misaligned((5, 200), np.uint16), LayoutError, "multiple of 2 bytes"),
    ("q", None, DTypeError, "NoneType is no tensor"),
    ("q", np.zeros((5, 200), np.int8), DTypeError, "dtype int8, expected float8_e4m3fn or uint8"),
    ("q", np.zeros((5, 199), np.uint8), ShapeError, r"shape \(5, 199\), expected \(5, 200\)"),
    ("q", np.zeros((200, 5), np.uint8).T, LayoutError, "stride 5 of the last dimension"),
    ("q", np.broadcast_to(np.zeros((1, 200), np.uint8), (5, 200)), LayoutError, "read-only"),
    ("s", np.zeros((5, 2), np.float64), DTypeError, "dtype float64, expected float32"),
    ("s", np.zeros((5, 1), np.float32), ShapeError, r"shape \(5, 1\), expected \(5, 2\)"),
    ("s", np.zeros((2, 5), np.float32), ShapeError, r"shape \(2, 5\), expected \(5, 2\)"),
    ("s", np.broadcast_to(np.zeros((1, 2), np.float32), (5, 2)), LayoutError, "read-only"),
    ("s", misaligned((5, 2), np.float32), LayoutError, "multiple of 4 bytes"),
]


@pytest.mark.parametrize(("name", "value", "error", "text"), ERRORS, ids=[f"{e[0]}-{e[3]}" for e in ERRORS])
def test_errors(name: str, value: Any, error: type[OperandError], text: str) -> None:
    arguments = good() | {name: value}
    with pytest.raises(error, match=text) as caught:
        fp8gemm.per_token_cast_to_fp8(arguments["x"], (arguments["q"], arguments["s"]))
    assert type(caught.value) is error
    assert caught.value.argument == name
    for output, poison in (("q", 0x55), ("s", -1)):
        assert name == output or (arguments[output] == poison).all()


@pytest.mark.parametrize("out", [(), (None,), 3, np.zeros((3, 5))], ids=repr)
def test_out_is_no_pair(out: Any) -> None:
    with pytest.raises(OperandError, match=r"must be a pair \(values, scales\)") as caught:
        fp8gemm.per_token_cast_to_fp8(np.ones((5, 200), np.float32), out)
    assert caught.value.argument == "out"


def test_outputs_on_another_device() -> None:
    class CudaLike:
        def __init__(self, array: Array) -> None:
            self.__cuda_array_interface__ = array.__array_interface__

    x = good()
    with pytest.raises(DeviceError, match="another device than x") as caught:
        fp8gemm.per_token_cast_to_fp8(x["x"], (CudaLike(x["q"]), x["s"]))
    assert caught.value.argument == "q"


def test_quantised_operands_make_a_product(rng: Rng) -> None:
    """The whole way: the product of what was quantised is near the product of what was given."""
    x, w = normal(rng, (50, 600), F32, 2)[:, :592], normal(rng, (70, 600), F32, 2)[:, :592]
    d = fp8gemm.gemm_fp8_fp8_bf16_nt(fp8gemm.per_token_cast_to_fp8(x), fp8gemm.per_block_cast_to_fp8(w)).numpy()
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    error = np.linalg.norm(d.view(BF16).astype(np.float64) - exact) / np.linalg.norm(exact)
    assert error < 0.06  # two roundings to e4m3, each of at most 1/16
