"""The CPU backend's GEMM and quantisers, called as the library calls them, with every plan and instruction set.

Products are compared with float64 products of the dequantised operands, quantisers bit for bit with NumPy and
ml_dtypes.
"""

import concurrent.futures
import ctypes
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from references import (
    BF16,
    E4M3,
    F32,
    SCALE_LAYOUTS,
    VALUES,
    Array,
    Operands,
    Output,
    Rng,
    ceil_div,
    check_accuracy,
    fresh_rng,
    in_child,
    native_tensor,
    padded,
    product,
    quantise,
    random_operands,
)

from fp8gemm import backends, native
from fp8gemm.errors import OperandError

TARGETS = ["", "avx2", "baseline"]  # at most this; "" is what the machine has


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FP8GEMM_CPU", request.param)
    return str(request.param)


def gemm(operands: Operands, threads: int = 2, tile_n: int = 64, d_padding: int = 0) -> Array:
    """D as bits of bf16. Checks that nothing beside D is written."""
    (m, k), n = operands.a.shape, operands.b.shape[0]
    output = Output((m, n), d_padding)
    given = {name: native_tensor(array) for name, array in operands._asdict().items()}
    call = native.Operands(kind=native.DENSE, **given, d=native_tensor(output.d))
    call.layout.ndim = -1
    problem = native.Problem(device_type=native.CPU, m=m, n=n, k=k, groups=1)
    plan = native.CpuPlan(threads, tile_n)
    native.library().cpu_gemm(ctypes.byref(call), ctypes.byref(problem), ctypes.byref(plan))
    output.check_untouched()
    return output.d


def values(d: Array) -> Array:
    wide: Array = d.copy().view(BF16).astype(np.float64)
    return wide


def check(rng: Rng, m: int, n: int, k: int, positive: bool = False, binades: float = 2, **plan: int) -> None:
    operands = random_operands(rng, m, n, k, positive=positive, binades=binades)
    check_accuracy(gemm(operands, **plan), operands)


def test_features(monkeypatch: pytest.MonkeyPatch) -> None:
    order = ["baseline", "avx2", "avx512f"]
    monkeypatch.delenv("FP8GEMM_CPU", raising=False)
    best = order.index(native.library().cpu_features().decode())
    for limit in order:
        monkeypatch.setenv("FP8GEMM_CPU", limit)
        assert native.library().cpu_features().decode() == order[min(best, order.index(limit))]


@pytest.mark.parametrize("kilobytes", [64, 256, 1024])
def test_a_caller_with_little_stack(kilobytes: int, rng: Rng) -> None:
    """Its tiles are left to a thread that has room. (Only our call is in this one: NumPy's matmul may need more.)"""
    operands = random_operands(rng, 300, 64, 256)
    found: list[Array] = []
    before = threading.stack_size(kilobytes << 10)
    try:
        thread = threading.Thread(target=lambda: found.append(gemm(operands, threads=1)))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    (d,) = found
    check_accuracy(d, operands)


def test_a_limit_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8GEMM_CPU", "sse9")
    with pytest.raises(OperandError, match="FP8GEMM_CPU: 'sse9'; must be avx2 or baseline"):
        backends.cpu_device()


@pytest.mark.usefixtures("target")
def test_every_code() -> None:
    """Each of the 256 codes through A and through B, times one: decoding is exact, NaN stays NaN."""
    codes = np.zeros((256, 16), np.uint8)
    codes[:, 5] = np.arange(256)
    one = np.full((1, 16), 0x38, np.uint8)
    scale = np.ones((256, 1), np.float32)
    np.testing.assert_array_equal(values(gemm(Operands(codes, scale, one, scale)))[:, 0], VALUES)
    np.testing.assert_array_equal(values(gemm(Operands(one, scale, codes, scale)))[0], VALUES)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("m", [1, 2, 5, 6, 7, 12, 13, 31, 64, 255, 256, 257, 600])
def test_rows(rng: Rng, m: int) -> None:
    check(rng, m, 144, 384)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 31, 33, 112, 127, 128, 129, 255, 257, 600])
def test_n_tails(rng: Rng, n: int) -> None:
    for tile_n in (16, 48, 256):
        check(rng, 9, n, 256, tile_n=tile_n, d_padding=3)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("k", [*range(16, 129, 16), *range(144, 256, 16), 1008, 4096])
def test_k_tails(rng: Rng, k: int) -> None:
    check(rng, 14, 40, k)


@pytest.mark.usefixtures("target")
def test_no_k() -> None:
    empty, scale = np.zeros((3, 0), np.uint8), np.ones((3, 1), np.float32)
    assert (gemm(Operands(empty, scale, empty, scale)) == 0).all()


@pytest.mark.usefixtures("target")
def test_all_positive(rng: Rng) -> None:
    """Sums that only grow: a lossy accumulator shows here first."""
    check(rng, 33, 200, 4096, positive=True)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("binades", [20, 60])
def test_scales_over_many_binades(rng: Rng, binades: int) -> None:
    check(rng, 33, 300, 1040, binades=binades)


@pytest.mark.usefixtures("target")
def test_exact_sums(rng: Rng) -> None:
    """Small integers and powers of two: FP32 holds every sum, and rounding to bf16 is all there is, ties included."""
    integers = np.arange(-8, 9).astype(E4M3).view(np.uint8)
    a, b = rng.choice(integers, (40, 512)), rng.choice(integers, (300, 512))
    sa, sb = (np.exp2(rng.integers(-2, 3, (rows, 4))).astype(np.float32) for rows in (40, 3))
    operands = Operands(a, sa, b, sb)
    exact, _ = product(operands)
    expected = exact.astype(np.float32).astype(BF16).astype(np.float64)
    np.testing.assert_array_equal(values(gemm(operands)), expected)


@given(st.data())
def test_any_problem(data: st.DataObject) -> None:
    draw = data.draw
    rng = fresh_rng(draw(st.integers(0, 2**32), label="seed"))
    m, n, k = draw(st.integers(1, 300)), draw(st.integers(1, 300)), 16 * draw(st.integers(1, 40))
    padding = [draw(st.integers(0, 40)) for _ in range(3)]
    compact = random_operands(rng, m, n, k, positive=draw(st.booleans()), binades=draw(st.integers(0, 30)))
    sa, sb = (draw(st.sampled_from(SCALE_LAYOUTS))(scales) for scales in (compact.sa, compact.sb))
    strided = Operands(padded(compact.a, padding[0], 0x7F), sa, padded(compact.b, padding[1], 0xFF), sb)
    plan = {"threads": draw(st.integers(1, 5)), "tile_n": 16 * draw(st.integers(1, 20)), "d_padding": padding[2]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FP8GEMM_CPU", draw(st.sampled_from(TARGETS)))
        d = gemm(strided, **plan)
    check_accuracy(d, compact)


@pytest.mark.usefixtures("target")
def test_rows_do_not_depend_on_the_plan(rng: Rng) -> None:
    operands = random_operands(rng, 520, 400, 400, binades=10)
    bits = gemm(operands, threads=1, tile_n=16)
    for m in (1, 2, 3, 6, 7, 11, 12, 13, 25, 256, 257, 520):
        first = int(rng.integers(0, 520 - m + 1))
        rows = slice(first, first + m)
        some = operands._replace(a=operands.a[rows], sa=operands.sa[rows])
        for threads, tile_n in ((1, 64), (2, 112), (3, 256)):
            np.testing.assert_array_equal(gemm(some, threads, tile_n), bits[rows])


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize(("m", "n"), [(1, 40), (300, 290)])
def test_nan_stays_where_it_belongs(rng: Rng, m: int, n: int) -> None:
    operands = random_operands(rng, m, n, 272)
    clean = gemm(operands)
    row, column, block = m // 2, n - 1, n // 2 // 128
    rows, columns = np.arange(m)[:, None], np.arange(n)
    for operand, index, value, where in (
        (operands.a, (row, 260), 0x7F, rows == row),
        (operands.b, (column, 130), 0xFF, columns == column),
        (operands.sa, (row, 1), np.nan, rows == row),
        (operands.sb, (block, 2), np.nan, columns // 128 == block),
    ):
        saved, operand[index] = operand[index], value
        d = gemm(operands)
        operand[index] = saved
        spoiled = np.broadcast_to(where, (m, n))
        assert np.isnan(values(d)[spoiled]).all()
        np.testing.assert_array_equal(d[~spoiled], clean[~spoiled])


def test_concurrent_calls_and_forks(rng: Rng) -> None:
    operands = random_operands(rng, 40, 512, 1024)
    bits = gemm(operands)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for d in pool.map(lambda _: gemm(operands, threads=3), range(12)):
            np.testing.assert_array_equal(d, bits)
    in_child(lambda: np.testing.assert_array_equal(gemm(operands), bits))


# ---- quantisers

TYPES = [BF16, np.dtype(np.float16), F32]
BFLOAT = 4  # DLPack's code


def cast(
    x: Array, per_block: int, threads: int = 2, q_padding: int = 0, column_major: bool = False
) -> tuple[Array, Array]:
    (rows, k), height = x.shape, 128 if per_block else 1
    buffer = np.full((rows, k + q_padding), 0x55, np.uint8)
    q = buffer[:, :k]
    s = np.full((ceil_div(rows, height), ceil_div(k, 128)), -1, np.float32, "F" if column_major else "C")
    views = native_tensor(x, BFLOAT if x.dtype == BF16 else None), native_tensor(q), native_tensor(s)
    native.library().cpu_cast(per_block, *(ctypes.byref(view) for view in views), threads)
    assert (buffer[:, k:] == 0x55).all()
    return q, s


def check_cast(x: Array, per_block: int, **layout: Any) -> None:
    q, s = quantise(x, 128 if per_block else 1)
    our_q, our_s = cast(x, per_block, **layout)
    np.testing.assert_array_equal(our_s, s)
    np.testing.assert_array_equal(our_q, q)


@pytest.mark.parametrize("per_block", [0, 1])
@pytest.mark.parametrize("type", TYPES, ids=str)
def test_cast(rng: Rng, type: Any, per_block: int) -> None:
    for rows, k in ((1, 1), (3, 128), (128, 128), (129, 500), (700, 1024)):
        x = rng.standard_normal((rows, k)) * np.exp2(rng.uniform(-14, 6, (rows, k)))
        check_cast(padded(x.astype(type), 5, np.nan), per_block, q_padding=7)
        check_cast(x.astype(type), per_block, threads=1, column_major=True)


@pytest.mark.parametrize("per_block", [0, 1])
@pytest.mark.parametrize("type", TYPES, ids=str)
def test_cast_special_values(rng: Rng, type: Any, per_block: int) -> None:
    """Zeros, blocks below the least scale, subnormals, infinities and NaN, each in a block of its own."""
    x = rng.standard_normal((128, 128 * 8)).astype(type)
    with np.errstate(under="ignore"):
        for j, factor in enumerate((0, -0.0, 1e-5, 1e-7, 2.0**-20)):
            x[:, j * 128 : (j + 1) * 128] *= np.asarray(factor, type)
    x[3, 5 * 128 + 9], x[3, 6 * 128 + 9], x[3, 7 * 128 + 9] = np.inf, -np.inf, np.nan
    check_cast(x, per_block)
    q, s = cast(x, per_block)
    spoiled = slice(None) if per_block else 3
    assert np.isnan(s[0 if per_block else 3, 7])
    assert (q[spoiled, 7 * 128 :] == 0x7F).all()


@pytest.mark.parametrize("per_block", [0, 1])
@pytest.mark.parametrize("type", TYPES, ids=str)
def test_cast_rounds_every_half(type: Any, per_block: int) -> None:
    """A largest value of 448 makes the scale one: all 16-bit floats below it then show the rounding, ties and all."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16 if type == F32 else type).astype(np.float32)
    halves = halves[np.abs(halves) <= 448]
    x = np.zeros((ceil_div(halves.size, 127), 127), np.float32)
    x.flat[: halves.size] = halves
    x = np.concatenate([np.full((len(x), 1), 448, np.float32), x], 1).astype(type)
    q, s = cast(x, per_block)
    assert (s == 1).all()
    np.testing.assert_array_equal(q, x.astype(np.float32).astype(E4M3).view(np.uint8))


@given(st.data())
def test_cast_any_bits(data: st.DataObject) -> None:
    draw = data.draw
    rng = fresh_rng(draw(st.integers(0, 2**32), label="seed"))
    rows, k, per_block = draw(st.integers(1, 200)), draw(st.integers(1, 400)), draw(st.integers(0, 1))
    type = draw(st.sampled_from(TYPES))
    x = rng.integers(0, 256, (rows, k * type.itemsize), dtype=np.uint8).view(type)
    with np.errstate(invalid="ignore"):
        wide = np.abs(x.astype(np.float32))
    x[~(wide < draw(st.sampled_from([np.inf, 1e4, 1e-3])))] = 0
    threads, q_padding = draw(st.integers(1, 4)), draw(st.integers(0, 9))
    strided = padded(x, draw(st.integers(0, 9)), 1)
    check_cast(strided, per_block, threads=threads, q_padding=q_padding, column_major=draw(st.booleans()))
