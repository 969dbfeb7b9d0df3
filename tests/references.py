"""What the library must compute, in NumPy and float64: operands, dequantised products, the criterion of accuracy.

A GEMM is judged against the product of its dequantised operands: its error must be that of rounding to bf16.
"""

import ctypes
import mmap
import os
import secrets
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fp8gemm import native
from fp8gemm.device import Device

Array = NDArray[Any]
Rng = np.random.Generator

SEED = int(os.environ.get("FP8GEMM_TEST_SEED") or secrets.randbits(32))
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float64)  # of each e4m3 code
POISON = 0x7FDE  # a NaN of bf16: what is left unwritten fails every comparison
FLOOR = 2.0**-20  # error that sums in FP32 may add, times the sum of the magnitudes
ALIGNMENT = 128  # of the segments of the contiguous form

# The weights (N, K) of DeepSeek-V3, and rows from decoding to prefill.
WEIGHTS = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048), (576, 7168)]

H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 132, 50 << 20, 232448, 1.98e9, 3.35e12)
H800 = Device("NVIDIA H800", (9, 0), 132, 50 << 20, 232448, 1.98e9, 3.35e12)
H20 = Device("NVIDIA H20", (9, 0), 78, 60 << 20, 232448, 1.98e9, 4.0e12)
GH200 = Device("NVIDIA GH200 480GB", (9, 0), 132, 60 << 20, 232448, 1.98e9, 4.9e12)
SMALL = Device("a made-up GPU of 16 SMs", (9, 0), 16, 8 << 20, 101376, 1.2e9, 0.0)  # a driver that tells no bandwidth
A100 = Device("NVIDIA A100-SXM4-80GB", (8, 0), 108, 40 << 20, 166912, 1.41e9, 2.0e12)
HOPPERS = [H100, H800, H20, GH200, SMALL]


def fresh_rng(*keys: int) -> Rng:
    """New numbers each run, the same within one; the seed is printed, and shown if the test fails."""
    print(f"rng of seed {SEED}, {keys}")
    return np.random.default_rng([SEED, *keys])


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ---- operands


def padded(array: Array, padding: int, fill: float) -> Array:
    """A view that holds `array`, each row followed by `padding` elements of `fill`."""
    buffer = np.full((*array.shape[:-1], array.shape[-1] + padding), fill, array.dtype)
    buffer[..., : array.shape[-1]] = array
    return buffer[..., : array.shape[-1]]


def column_major(scales: Array, multiple: int = 4) -> Array:
    """Scales with rows fastest and a leading dimension of a multiple of 4, per group: what TMA reads."""
    *groups, rows, columns = scales.shape
    buffer = np.full((*groups, columns, ceil_div(rows, multiple) * multiple), np.nan, scales.dtype)
    view = buffer.swapaxes(-1, -2)[..., :rows, :]
    view[...] = scales
    return view


SCALE_LAYOUTS: list[Callable[[Array], Array]] = [
    np.ascontiguousarray,
    column_major,
    lambda scales: column_major(scales, 1),
    lambda scales: padded(scales, 3, np.nan),
]


def random_codes(rng: Rng, shape: Sequence[int], positive: bool = False) -> Array:
    """Every code but NaN: magnitudes spread over all of e4m3, and so over its subnormals too."""
    codes = rng.integers(0, 0x7F, shape, dtype=np.uint8)
    return codes if positive else codes | rng.integers(0, 2, shape, dtype=np.uint8) << 7


def random_scales(rng: Rng, shape: Sequence[int], binades: float = 2) -> Array:
    return np.exp2(rng.uniform(-binades / 2, binades / 2, shape)).astype(np.float32)


class Operands(NamedTuple):
    """One problem's inputs; with groups, each has a first dimension of G where the library wants one."""

    a: Array
    sa: Array
    b: Array
    sb: Array

    @property
    def lhs(self) -> tuple[Array, Array]:
        return self.a, self.sa

    @property
    def rhs(self) -> tuple[Array, Array]:
        return self.b, self.sb


def random_operands(
    rng: Rng,
    m: int,
    n: int,
    k: int,
    groups_a: Sequence[int] = (),
    groups_b: Sequence[int] = (),
    positive: bool = False,
    binades: float = 2,
) -> Operands:
    """A (*groups_a, m, k) and B (*groups_b, n, k) with their scales, all compact."""
    blocks = ceil_div(k, 128)
    return Operands(
        random_codes(rng, (*groups_a, m, k), positive),
        random_scales(rng, (*groups_a, m, blocks), binades),
        random_codes(rng, (*groups_b, n, k), positive),
        random_scales(rng, (*groups_b, ceil_div(n, 128), blocks), binades),
    )


# ---- the result


def expand(scales: Array, rows: int, k: int, height: int) -> Array:
    """Scales of blocks of height x 128, one for each element."""
    return scales.astype(np.float64).repeat(height, 0)[:rows].repeat(128, 1)[:, :k]


def dequantise(codes: Array, scales: Array, height: int) -> Array:
    values: Array = VALUES[codes] * expand(scales, codes.shape[0], codes.shape[1], height)
    return values


def product(operands: Operands) -> tuple[Array, Array]:
    """The product in float64, and the sums of its terms' magnitudes."""
    a, b = dequantise(*operands.lhs, 1), dequantise(*operands.rhs, 128)
    return a @ b.T, np.abs(a) @ np.abs(b).T


def judge(error: Array, rounding: Array, columns: int, floor: float | Array = 0.0) -> None:
    """The criterion. `error` and `rounding`: the norm of each row's error, ours and that of rounding to bf16.

    Within 5% in all and twice in the worst row; a row of few elements may be lucky to need no rounding.
    """
    total, ideal = np.linalg.norm(error), np.linalg.norm(rounding)
    floors = np.broadcast_to(floor, error.shape)
    assert total <= 1.05 * ideal + np.linalg.norm(floors), f"error {total}, that of rounding to bf16 {ideal}"
    if columns >= 64:
        bad = np.flatnonzero(~(error <= 2 * rounding + floors))
        assert not len(bad), f"rows {bad[:8]}: errors {error[bad[:8]]}, those of rounding {rounding[bad[:8]]}"


def check_accuracy(d: Array, operands: Operands) -> None:
    """D, as bits of bf16, is the product of the dequantised operands, as well as bf16 can say it."""
    exact, magnitude = product(operands)
    assert d.shape == exact.shape
    assert np.isfinite(exact).all()
    result = np.ascontiguousarray(d).view(BF16).astype(np.float64)
    error = np.linalg.norm(result - exact, axis=-1)
    rounding = np.linalg.norm(exact.astype(BF16).astype(np.float64) - exact, axis=-1)
    judge(error, rounding, d.shape[-1], FLOOR * np.linalg.norm(magnitude, axis=-1))


def quantise(x: Array, height: int) -> tuple[Array, Array]:
    """(codes, scales) of blocks of height x 128, by NumPy and ml_dtypes."""
    rows, k = x.shape
    values = x.astype(np.float32)
    scales = np.empty((ceil_div(rows, height), ceil_div(k, 128)), np.float32)
    for i, j in np.ndindex(*scales.shape):
        amax = np.abs(values[i * height : (i + 1) * height, j * 128 : (j + 1) * 128]).max()
        scales[i, j] = np.maximum(amax, np.float32(1e-4)) / np.float32(448)
    with np.errstate(invalid="ignore"):
        scaled = values / scales.repeat(height, 0)[:rows].repeat(128, 1)[:, :k]
    codes = np.clip(scaled, -448, 448).astype(E4M3).view(np.uint8)
    codes[np.isnan(scaled)] = 0x7F
    return codes, scales


class Output:
    """A place for D, (M, N) or (G, M, N), inside a buffer of poison: rows `padding` apart, rows before and after."""

    def __init__(self, shape: Sequence[int], padding: int = 0, offset: int = 0, spare_rows: int = 2) -> None:
        *groups, m, n = shape
        row = n + padding
        stack = int(np.prod(groups, initial=1))
        self.buffer = np.full(offset + (stack * (m + spare_rows) + spare_rows) * row + offset, POISON, np.uint16)
        steps = [2 * row * (m + spare_rows)] * len(groups) + [2 * row, 2]
        first = self.buffer[offset + spare_rows * row :]
        self.d = np.lib.stride_tricks.as_strided(first, tuple(shape), steps)

    def check_untouched(self, written: Array | None = None) -> None:
        """Nothing but the rows `written` of d (all by default) was written."""
        rows = np.ones(self.d.shape[:-1], bool) if written is None else written
        saved = self.d.copy()
        self.d[rows] = POISON
        intact = (self.buffer == POISON).all()
        self.d[...] = saved
        assert intact, "written outside d, or rows of d that belong to nobody"


# ---- memory


def native_tensor(array: Array, code: int | None = None, **fields: int) -> native.Tensor:
    """A CPU array as the library describes it to itself; `code` is DLPack's, by default that of the dtype."""
    codes = {"i": 0, "u": 1, "f": 2}
    tensor = native.Tensor(device_type=native.CPU, dtype_bits=array.itemsize * 8, dtype_lanes=1, ndim=array.ndim)
    tensor.dtype_code = codes[array.dtype.kind] if code is None else code
    tensor.data = array.ctypes.data
    tensor.shape[: array.ndim] = array.shape
    tensor.stride[: array.ndim] = [step // array.itemsize for step in array.strides]
    for name, value in fields.items():
        setattr(tensor, name, value)
    return tensor


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def fenced(array: Array, at_end: bool = True) -> Array:
    """A copy that ends (or begins) at a page which nobody may touch."""
    page = mmap.PAGESIZE
    inner = max(ceil_div(array.nbytes, page), 1) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    for fence in (address, address + page + inner):
        if _libc.mprotect(fence, page, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = page + (inner - array.nbytes if at_end else 0)
    copy = np.frombuffer(memory, array.dtype, array.size, start).reshape(array.shape)
    copy[...] = array
    return copy


def in_child(body: Callable[[], object]) -> None:
    """Runs `body` in a fork of this process, so that a crash fails one test only."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads, such as those of a BLAS
        child = os.fork()
    if child == 0:
        status = 1
        try:
            body()
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"the child ended with {'signal' if status < 0 else 'status'} {abs(status)}"


# ---- groups


def segments(sizes: Iterable[int], alignment: int = ALIGNMENT) -> tuple[list[int], int]:
    """First row of each group when groups begin at multiples of `alignment`, and rows in all."""
    firsts, row = [], 0
    for size in sizes:
        firsts.append(row)
        row += ceil_div(size, alignment) * alignment
    return firsts, row


def m_indices_of(sizes: Sequence[int]) -> Array:
    """Each row's group, or -1 for padding: the contiguous form."""
    firsts, rows = segments(sizes)
    indices = np.full(rows, -1, np.int32)
    for group, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
        indices[first : first + size] = group
    return indices
