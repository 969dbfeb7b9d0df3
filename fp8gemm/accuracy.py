"""What a product is checked by: e4m3 and bf16 spelt out, and the error of an output beside that of rounding alone.

Array functions take their array module as `xp` (numpy or cupy), so that no framework is imported here.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

BLOCK = 128  # K under one scale; rows of B under one scale
TOLERANCE = 1.05  # times the error of merely rounding to bf16: a bf16 partial sum or scale is worse
WORST_ROW = 2.0  # the same of any one row
POISON = 0x7FDE  # a NaN of bf16: an element that nobody wrote fails every check
_BF16_EXPONENT = 0x7F80


class Check(NamedTuple):
    """||D - ref|| / ||ref||, the same for ref rounded to bf16, and the greatest ratio of the two in one row."""

    error: float
    rounding: float
    worst_row: float
    rows: int  # rows of D that were compared

    @property
    def ratio(self) -> float:
        """Error beside that of rounding alone: 1 is perfect."""
        if self.error == self.rounding:
            return 1.0
        return self.error / self.rounding if self.rounding else math.inf

    @property
    def right(self) -> bool:
        """Within 5% of rounding alone, the worst row within 2x."""
        return self.ratio <= TOLERANCE and self.worst_row <= WORST_ROW  # both false for NaN


def e4m3_values(xp: Any, dtype: Any) -> Any:
    """The value of each of the 256 codes, (256,)."""
    code = xp.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = xp.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude = xp.where(code & 127 == 127, xp.nan, magnitude)
    return xp.where(code & 128, -magnitude, magnitude).astype(dtype)


def to_bf16(xp: Any, x: Any) -> Any:
    """Bits (uint16) of finite float32 x, rounded to nearest even."""
    bits = x.view(xp.uint32)
    return ((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16).astype(xp.uint16)


def from_bf16(xp: Any, bits: Any) -> Any:
    """Values (float32) of bf16 bits (uint16)."""
    return (bits.astype(xp.uint32) << 16).view(xp.float32)


def finite(xp: Any, bits: Any) -> bool:
    """Whether no element of bf16 bits is NaN or Inf, poison included."""
    return bool(((bits & _BF16_EXPONENT) != _BF16_EXPONENT).all())


def dequantise(xp: Any, matrix: tuple[Any, Any], rows: int, values: Any) -> Any:
    """Codes (R, K) and scales (ceil(R / rows), ceil(K / 128)) -> their product, in the type of `values` (256,)."""
    q, s = matrix
    scale = xp.repeat(s.astype(values.dtype), BLOCK, axis=1)[:, : q.shape[1]]
    if rows == 1:
        return xp.take(values, q) * scale
    out = xp.empty(q.shape, values.dtype)
    for i in range(0, q.shape[0], rows):  # a block at a time stays in the CPU's cache
        xp.multiply(xp.take(values, q[i : i + rows]), scale[i // rows], out=out[i : i + rows])
    return out


def row_errors(out: Any, ref: Any, rounded: Any) -> list[tuple[float, float, float]]:
    """Per row the squares of ||out - ref||, ||rounded - ref|| and ||ref||, of float64 matrices of any framework."""
    sums = (((x * x).sum(-1).tolist()) for x in (out - ref, rounded - ref, ref))
    return list(zip(*sums, strict=True))


def summarise(rows: Sequence[tuple[float, float, float]]) -> Check:
    """The check of all rows together."""
    error, rounding, size = (math.sqrt(sum(column)) for column in zip(*rows, strict=True))
    worst = 0.0
    for e, r, _ in rows:
        ratio = 1.0 if e == r else math.sqrt(e / r) if r else math.inf
        worst = ratio if not ratio <= worst else worst  # a NaN counts as the worst
    return Check(error / size if size else error, rounding / size if size else rounding, worst, len(rows))


def reference_errors(xp: Any, lhs: Any, rhs: Any, d: Any, columns: int = 4096) -> list[tuple[float, float, float]]:
    """`row_errors` of D (M, N) bf16 bits against the float64 product of the dequantised operands.

    lhs: q (M, K), s (M, ceil(K / 128)); rhs: q (N, K), s (ceil(N / 128), ceil(K / 128)). B is dequantised some
    `columns` of D at a time (a multiple of 128): 8 bytes an element would be a lot.
    """
    values = e4m3_values(xp, xp.float64)
    a, parts = dequantise(xp, lhs, 1, values), []
    for n in range(0, rhs[0].shape[0], columns):
        part = rhs[0][n : n + columns], rhs[1][n // BLOCK : (n + columns) // BLOCK]
        ref = a @ dequantise(xp, part, BLOCK, values).T
        out = from_bf16(xp, d[:, n : n + columns]).astype(xp.float64)
        rounded = from_bf16(xp, to_bf16(xp, ref.astype(xp.float32))).astype(xp.float64)
        parts.append(row_errors(out, ref, rounded))
    return [tuple(map(sum, zip(*row, strict=True))) for row in zip(*parts, strict=True)]  # type: ignore[misc]
