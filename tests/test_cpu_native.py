"""The CPU backend's GEMM and quantisers, called as the host library calls them.

Products are compared with float64 products of the dequantised operands, quantisers bit for bit with NumPy and
ml_dtypes.
"""

import concurrent.futures
import ctypes
import os
import pathlib
import subprocess

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

HOST = pathlib.Path(__file__).parent.parent / "native" / "host"
SHIM = """
#include "cpu.h"
#define EXPORT extern "C" __attribute__((visibility("default")))
using namespace fp8gemm;
EXPORT void gemm(const CpuGemm* problem) { cpu_gemm(*problem); }
EXPORT const char* features() { return cpu_features(); }
EXPORT void cast(int per_block, int64_t rows, int64_t k, int type, const void* x, int64_t x_row, uint8_t* q,
                 int64_t q_row, float* s, int64_t s_row, int64_t s_k, int threads) {
    (per_block ? cpu_cast_per_block : cpu_cast_per_token)(rows, k, FloatType(type), x, x_row, q, q_row, s, s_row, s_k,
                                                          threads);
}
"""

E4M3 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
POISON = 0x7FDE  # a NaN of bf16: what is left unwritten fails every comparison
VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float64)
TARGETS = ["", "avx2", "baseline"]  # at most this; "" is what the machine has


class CpuGemm(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_int64) for name in ("m", "n", "k")]
        + [("a", ctypes.c_void_p), ("a_row", ctypes.c_int64), ("b", ctypes.c_void_p), ("b_row", ctypes.c_int64)]
        + [("sa", ctypes.c_void_p), ("sa_row", ctypes.c_int64), ("sa_k", ctypes.c_int64)]
        + [("sb", ctypes.c_void_p), ("sb_row", ctypes.c_int64), ("sb_k", ctypes.c_int64)]
        + [("d", ctypes.c_void_p), ("d_row", ctypes.c_int64), ("threads", ctypes.c_int), ("tile_n", ctypes.c_int)]
    )


@pytest.fixture(scope="session")
def cpu_library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu")
    (folder / "shim.cpp").write_text(SHIM)
    sources = [folder / "shim.cpp", HOST / "cpu_gemm.cpp", HOST / "cpu_quantize.cpp"]
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-shared", "-pthread", f"-I{HOST}"]
    subprocess.run(["g++", *flags, *sources, "-o", folder / "cpu.so"], check=True)
    library = ctypes.CDLL(str(folder / "cpu.so"))
    library.features.restype = ctypes.c_char_p
    size, address, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    matrices = [address, size, address, size, address, size, size]
    library.cast.argtypes = [number, size, size, number, *matrices, number]
    return library


@pytest.fixture(params=TARGETS)
def target(request, monkeypatch):
    monkeypatch.setenv("FP8GEMM_CPU", request.param)
    return request.param


@pytest.fixture
def rng():
    return fresh_rng()


def fresh_rng(seed=None):
    seed = np.random.SeedSequence().entropy if seed is None else seed
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def ceil_div(a, b):
    return -(-a // b)


def matrix(array):
    """Address and row stride, as the C++ side takes a matrix whose columns are contiguous."""
    return array.ctypes.data, array.strides[0] // array.itemsize


def scales(array):
    """Address and both strides."""
    return (*matrix(array), array.strides[1] // array.itemsize)


def padded(array, padding, fill):
    """A view that holds `array`, each row followed by `padding` elements of `fill`."""
    buffer = np.full((array.shape[0], array.shape[1] + padding), fill, array.dtype)
    buffer[:, : array.shape[1]] = array
    return buffer[:, : array.shape[1]]


def random_codes(rng, shape, positive=False):
    """Every code but NaN, magnitudes spread over all of e4m3 and so over its subnormals too."""
    codes = rng.integers(0, 0x7F, shape, dtype=np.uint8)
    return codes if positive else codes | rng.integers(0, 2, shape, dtype=np.uint8) << 7


def make_scales(rng, shape, binades=2):
    return np.exp2(rng.uniform(-binades / 2, binades / 2, shape)).astype(np.float32)


def random_problem(rng, m, n, k, positive=False, binades=2):
    a, b = random_codes(rng, (m, k), positive), random_codes(rng, (n, k), positive)
    blocks = ceil_div(k, 128)
    return a, b, make_scales(rng, (m, blocks), binades), make_scales(rng, (ceil_div(n, 128), blocks), binades)


def gemm(library, a, b, sa, sb, threads=2, tile_n=64, d_padding=0):
    """D as float64. Checks that nothing beside D is written."""
    (m, k), n = a.shape, b.shape[0]
    buffer = np.full((m + 2, n + d_padding), POISON, np.uint16)
    d = buffer[1:-1, :n]
    problem = CpuGemm(m, n, k, *matrix(a), *matrix(b), *scales(sa), *scales(sb), *matrix(d), threads, tile_n)
    library.gemm(ctypes.byref(problem))
    assert (buffer[[0, -1]] == POISON).all()
    assert (buffer[:, n:] == POISON).all()
    return d.view(BF16)


def expand(scales, rows, k, height):
    return scales.astype(np.float64).repeat(height, 0)[:rows].repeat(128, 1)[:, :k]


def reference(a, b, sa, sb):
    """The product in float64, and the sums of its terms' magnitudes."""
    a, b = VALUES[a] * expand(sa, *a.shape, 1), VALUES[b] * expand(sb, *b.shape, 128)
    return a @ b.T, np.abs(a) @ np.abs(b).T


def check_accuracy(d, a, b, sa, sb):
    """As good as the product rounded to bf16: 5% in norm, twice in the worst row; FP32 sums may add their own error."""
    exact, magnitude = reference(a, b, sa, sb)
    assert np.isfinite(exact).all()

    def errors(result):
        return np.linalg.norm(result.astype(np.float64) - exact, axis=1)

    scale, floor = np.linalg.norm(exact, axis=1), 2.0**-20 * np.linalg.norm(magnitude, axis=1)
    ours, rounding = errors(d), errors(exact.astype(BF16))
    assert np.linalg.norm(ours) <= 1.05 * np.linalg.norm(rounding) + np.linalg.norm(floor)
    used = scale > 0
    worst = np.max((rounding / np.where(used, scale, 1))[used], initial=0)
    assert (ours[used] <= 2 * worst * scale[used] + floor[used]).all()
    assert (ours[~used] == 0).all()


def check(library, rng, m, n, k, positive=False, binades=2, **plan):
    problem = random_problem(rng, m, n, k, positive, binades)
    check_accuracy(gemm(library, *problem, **plan), *problem)


def test_features(cpu_library, monkeypatch):
    order = ["baseline", "avx2", "avx512f"]
    monkeypatch.delenv("FP8GEMM_CPU", raising=False)
    best = order.index(cpu_library.features().decode())
    for limit in order:
        monkeypatch.setenv("FP8GEMM_CPU", limit)
        assert cpu_library.features().decode() == order[min(best, order.index(limit))]


def test_every_code(cpu_library, target):
    """Each of the 256 codes through A and through B, times one: decoding is exact, NaN stays NaN."""
    codes = np.zeros((256, 16), np.uint8)
    codes[:, 5] = np.arange(256)
    one = np.full((1, 16), 0x38, np.uint8)
    scale = np.ones((256, 1), np.float32)
    np.testing.assert_array_equal(gemm(cpu_library, codes, one, scale, scale)[:, 0].astype(np.float64), VALUES)
    np.testing.assert_array_equal(gemm(cpu_library, one, codes, scale, scale)[0].astype(np.float64), VALUES)


@pytest.mark.parametrize("m", [1, 2, 5, 6, 7, 12, 13, 31, 64, 255, 256, 257, 600])
def test_rows(cpu_library, target, rng, m):
    check(cpu_library, rng, m, 144, 384)


@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 31, 33, 112, 127, 128, 129, 255, 257, 600])
def test_n_tails(cpu_library, target, rng, n):
    for tile_n in (16, 48, 256):
        check(cpu_library, rng, 9, n, 256, tile_n=tile_n, d_padding=3)


@pytest.mark.parametrize("k", [*range(16, 129, 16), *range(144, 256, 16), 1008, 4096])
def test_k_tails(cpu_library, target, rng, k):
    check(cpu_library, rng, 14, 40, k)


def test_no_k(cpu_library, target):
    empty, scale = np.zeros((3, 0), np.uint8), np.ones((3, 1), np.float32)
    assert (gemm(cpu_library, empty, empty, scale, scale) == 0).all()


def test_all_positive(cpu_library, target, rng):
    """Sums that only grow: a lossy accumulator shows here first."""
    check(cpu_library, rng, 33, 200, 4096, positive=True)


@pytest.mark.parametrize("binades", [20, 60])
def test_scales_over_many_binades(cpu_library, target, rng, binades):
    check(cpu_library, rng, 33, 300, 1040, binades=binades)


def test_exact_sums(cpu_library, target, rng):
    """Small integers and powers of two: FP32 holds every sum, and rounding to bf16 is all there is, ties included."""
    integers = np.arange(-8, 9).astype(E4M3).view(np.uint8)
    a, b = rng.choice(integers, (40, 512)), rng.choice(integers, (300, 512))
    sa, sb = (np.exp2(rng.integers(-2, 3, (rows, 4))).astype(np.float32) for rows in (40, 3))
    exact, _ = reference(a, b, sa, sb)
    np.testing.assert_array_equal(gemm(cpu_library, a, b, sa, sb), exact.astype(np.float32).astype(BF16))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_problem(cpu_library, data):
    draw = data.draw
    rng = fresh_rng(draw(st.integers(0, 2**32), label="seed"))
    m, n, k = draw(st.integers(1, 300)), draw(st.integers(1, 300)), 16 * draw(st.integers(1, 40))
    padding = [draw(st.integers(0, 40)) for _ in range(3)]
    a, b, sa, sb = random_problem(rng, m, n, k, draw(st.booleans()), draw(st.integers(0, 30)))
    views = padded(a, padding[0], 0x7F), padded(b, padding[1], 0xFF)
    orders = [np.ascontiguousarray, np.asfortranarray, lambda array: padded(array, 3, np.nan)]
    layouts = [draw(st.sampled_from(orders))(array) for array in (sa, sb)]
    os.environ["FP8GEMM_CPU"] = draw(st.sampled_from(TARGETS))
    try:
        plan = {"threads": draw(st.integers(1, 5)), "tile_n": 16 * draw(st.integers(1, 20)), "d_padding": padding[2]}
        d = gemm(cpu_library, *views, *layouts, **plan)
    finally:
        del os.environ["FP8GEMM_CPU"]
    check_accuracy(d, a, b, sa, sb)


def test_rows_do_not_depend_on_the_plan(cpu_library, target, rng):
    a, b, sa, sb = random_problem(rng, 520, 400, 400, binades=10)
    bits = gemm(cpu_library, a, b, sa, sb, threads=1, tile_n=16).view(np.uint16)
    for m in (1, 2, 3, 6, 7, 11, 12, 13, 25, 256, 257, 520):
        first = rng.integers(0, 520 - m + 1)
        rows = slice(first, first + m)
        for threads, tile_n in ((1, 64), (2, 112), (3, 256)):
            some = gemm(cpu_library, a[rows], b, sa[rows], sb, threads, tile_n).view(np.uint16)
            np.testing.assert_array_equal(some, bits[rows])


@pytest.mark.parametrize(("m", "n"), [(1, 40), (300, 290)])
def test_nan_stays_where_it_belongs(cpu_library, target, rng, m, n):
    a, b, sa, sb = random_problem(rng, m, n, 272)
    clean = gemm(cpu_library, a, b, sa, sb).view(np.uint16)
    row, column, block = m // 2, n - 1, n // 2 // 128
    rows, columns = np.arange(m)[:, None], np.arange(n)
    for operand, index, value, spoiled in (
        (a, (row, 260), 0x7F, rows == row),
        (b, (column, 130), 0xFF, columns == column),
        (sa, (row, 1), np.nan, rows == row),
        (sb, (block, 2), np.nan, columns // 128 == block),
    ):
        saved, operand[index] = operand[index], value
        d = gemm(cpu_library, a, b, sa, sb)
        operand[index] = saved
        spoiled = np.broadcast_to(spoiled, (m, n))
        assert np.isnan(d[spoiled].astype(np.float32)).all()
        np.testing.assert_array_equal(d.view(np.uint16)[~spoiled], clean[~spoiled])


def test_concurrent_calls_and_forks(cpu_library, rng):
    problem = random_problem(rng, 40, 512, 1024)
    bits = gemm(cpu_library, *problem).view(np.uint16)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for d in pool.map(lambda _: gemm(cpu_library, *problem, threads=3), range(12)):
            np.testing.assert_array_equal(d.view(np.uint16), bits)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(gemm(cpu_library, *problem).view(np.uint16), bits) else 1)
    assert os.waitpid(child, 0)[1] == 0


# ---- quantisers

TYPES = [BF16, np.float16, np.float32]  # in the order of FloatType


def cast(library, x, per_block, threads=2, q_padding=0, column_major=False):
    (rows, k), height = x.shape, 128 if per_block else 1
    q = padded(np.full((rows, k), 0x55, np.uint8), q_padding, 0x55)
    s = np.full((ceil_div(rows, height), ceil_div(k, 128)), -1, np.float32, "F" if column_major else "C")
    library.cast(per_block, rows, k, TYPES.index(x.dtype), *matrix(x), *matrix(q), *scales(s), threads)
    assert (q.base[:, k:] == 0x55).all()
    return q, s


def check_cast(library, x, per_block, **layout):
    (rows, k), height = x.shape, 128 if per_block else 1
    values = x.astype(np.float32)
    s = np.empty((ceil_div(rows, height), ceil_div(k, 128)), np.float32)
    for i, j in np.ndindex(*s.shape):
        amax = np.abs(values[i * height : (i + 1) * height, j * 128 : (j + 1) * 128]).max()
        s[i, j] = np.maximum(amax, np.float32(1e-4)) / np.float32(448)
    with np.errstate(invalid="ignore"):
        scaled = values / s.repeat(height, 0)[:rows].repeat(128, 1)[:, :k]
    q = np.clip(scaled, -448, 448).astype(E4M3).view(np.uint8)
    q[np.isnan(scaled)] = 0x7F
    our_q, our_s = cast(library, x, per_block, **layout)
    np.testing.assert_array_equal(our_s, s)
    np.testing.assert_array_equal(our_q, q)


@pytest.mark.parametrize("per_block", [0, 1])
@pytest.mark.parametrize("type", TYPES)
def test_cast(cpu_library, rng, type, per_block):
    for rows, k in ((1, 1), (3, 128), (128, 128), (129, 500), (700, 1024)):
        x = rng.standard_normal((rows, k)) * np.exp2(rng.uniform(-14, 6, (rows, k)))
        check_cast(cpu_library, padded(x.astype(type), 5, np.nan), per_block, q_padding=7)
        check_cast(cpu_library, x.astype(type), per_block, threads=1, column_major=True)


@pytest.mark.parametrize("per_block", [0, 1])
@pytest.mark.parametrize("type", TYPES)
def test_cast_special_values(cpu_library, rng, type, per_block):
    """Zeros, blocks below the least scale, subnormals, infinities and NaN, each in a block of its own."""
    x = rng.standard_normal((128, 128 * 8)).astype(type)
    with np.errstate(under="ignore"):
        for j, factor in enumerate((0, -0.0, 1e-5, 1e-7, 2.0**-20)):
            x[:, j * 128 : (j + 1) * 128] *= np.asarray(factor, type)
    x[3, 5 * 128 + 9], x[3, 6 * 128 + 9], x[3, 7 * 128 + 9] = np.inf, -np.inf, np.nan
    check_cast(cpu_library, x, per_block)
    q, s = cast(cpu_library, x, per_block)
    spoiled = slice(None) if per_block else 3
    assert np.isnan(s[0 if per_block else 3, 7])
    assert (q[spoiled, 7 * 128 :] == 0x7F).all()


@pytest.mark.parametrize("per_block", [0, 1])
@pytest.mark.parametrize("type", TYPES)
def test_cast_rounds_every_half(cpu_library, type, per_block):
    """A largest value of 448 makes the scale one: all 16-bit floats below it then show the rounding, ties and all."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16 if type is np.float32 else type).astype(np.float32)
    halves = halves[np.abs(halves) <= 448]
    x = np.zeros((ceil_div(halves.size, 127), 127), np.float32)
    x.flat[: halves.size] = halves
    x = np.concatenate([np.full((len(x), 1), 448, np.float32), x], 1).astype(type)
    q, s = cast(cpu_library, x, per_block)
    assert (s == 1).all()
    np.testing.assert_array_equal(q, x.astype(np.float32).astype(E4M3).view(np.uint8))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cast_any_bits(cpu_library, data):
    draw = data.draw
    rng = fresh_rng(draw(st.integers(0, 2**32), label="seed"))
    rows, k, per_block = draw(st.integers(1, 200)), draw(st.integers(1, 400)), draw(st.integers(0, 1))
    type = np.dtype(draw(st.sampled_from(TYPES)))
    x = rng.integers(0, 256, (rows, k * type.itemsize), dtype=np.uint8).view(type)
    with np.errstate(invalid="ignore"):
        wide = np.abs(x.astype(np.float32))
    x[~(wide < draw(st.sampled_from([np.inf, 1e4, 1e-3])))] = 0
    layout = {"threads": draw(st.integers(1, 4)), "q_padding": draw(st.integers(0, 9))}
    layout["column_major"] = draw(st.booleans())
    check_cast(cpu_library, padded(x, draw(st.integers(0, 9)), 1), per_block, **layout)
