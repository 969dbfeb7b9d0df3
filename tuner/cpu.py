"""The rig of the CPU backend: NumPy holds the operands, float64 is the reference."""

import ctypes
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from fp8gemm import accuracy, native
from fp8gemm.layout import ceil_div
from fp8gemm.store import AnyPlan, Task

from . import operands

CHECKED_ROWS = 16  # of each piece: float64 products are slow
SAMPLE = 0.004  # seconds of calls that make one sample, of which the fastest counts


class CpuRig:
    """One problem in main memory; `Rig` in measure.py."""

    def __init__(self, task: Task) -> None:
        p = task.problem
        rng = np.random.default_rng(0)
        blocks = ceil_div(p.k, accuracy.BLOCK)
        grouped, masked = p.kind != native.DENSE, p.kind == native.MASKED
        rows, weights = ((p.groups,) if masked else ()), ((p.groups,) if grouped else ())
        self.a, self.sa = _codes(rng, (*rows, p.m, p.k)), _scales(rng, (*rows, p.m, blocks))
        self.b = _codes(rng, (*weights, p.n, p.k))
        self.sb = _scales(rng, (*weights, ceil_div(p.n, accuracy.BLOCK), blocks))
        self.d = np.empty((*rows, p.m, p.n), np.uint16)
        self.layout = np.array(operands.layout(p), np.int32)
        self._operands = native.Operands(kind=p.kind)
        for name in ("a", "sa", "b", "sb", "d") + (("layout",) if grouped else ()):
            setattr(self._operands, name, _view(getattr(self, name)))
        if not grouped:
            self._operands.layout.ndim = -1
        self._found = native.Problem()
        native.library().describe(ctypes.byref(self._operands), ctypes.byref(self._found))
        self._calls = itertools.count()
        parts = operands.pieces(p)
        self._owned = np.zeros(self.d.shape[:-1], bool)  # rows of D that a call writes
        for part in parts:
            owned = self._owned[part.group] if masked else self._owned
            owned[part.first : part.first + part.rows] = True
        self._reference = list(self._references(parts))

    def _references(self, parts: list[operands.Piece]) -> Any:
        """(rows of D, the float64 product there, that rounded to bf16) of a sample of rows of each piece."""
        values = accuracy.e4m3_values(np, np.float64)
        masked = self._found.kind == native.MASKED
        for part in parts:
            if not part.rows:
                continue
            rows = part.first + np.unique(np.linspace(0, part.rows - 1, min(part.rows, CHECKED_ROWS)).astype(int))
            where: Any = (part.group, rows) if masked else rows
            a = accuracy.dequantise(np, (self.a[where], self.sa[where]), 1, values)
            grouped = self._found.kind != native.DENSE
            b, sb = (self.b[part.group], self.sb[part.group]) if grouped else (self.b, self.sb)
            columns = []
            for n in range(0, len(b), 4096):
                block = b[n : n + 4096], sb[n // accuracy.BLOCK : (n + 4096) // accuracy.BLOCK]
                columns.append(a @ accuracy.dequantise(np, block, accuracy.BLOCK, values).T)
            exact = np.concatenate(columns, axis=1)
            yield where, exact, _round(exact)

    def _run(self, plan: AnyPlan) -> None:
        library = native.library()
        o, p = ctypes.byref(self._operands), ctypes.byref(self._found)
        library.cpu_gemm(o, p, ctypes.byref(native.CpuPlan(*plan)))

    def error(self, plan: AnyPlan) -> float:
        self.d.fill(accuracy.POISON)
        self._run(plan)
        if not accuracy.finite(np, self.d[self._owned]) or (self.d[~self._owned] != accuracy.POISON).any():
            return math.inf
        rows = []
        for where, exact, rounded in self._reference:
            out = accuracy.from_bf16(np, self.d[where]).astype(np.float64)
            rows += accuracy.row_errors(out, exact, rounded)
        check = accuracy.summarise(rows)
        return check.ratio if check.worst_row <= accuracy.WORST_ROW else math.inf

    def times(self, plans: Sequence[AnyPlan], rounds: int) -> list[list[float]]:
        found: list[list[float]] = [[] for _ in plans]
        for _ in range(rounds):
            first = next(self._calls)
            for i in range(len(plans)):
                turn = (first + i) % len(plans)
                found[turn].append(self._sample(plans[turn]))
        return found

    def _sample(self, plan: AnyPlan) -> float:
        best, until = math.inf, time.perf_counter() + SAMPLE
        while (started := time.perf_counter()) < until:
            self._run(plan)
            best = min(best, time.perf_counter() - started)
        return best

    def renew(self, plans: Sequence[AnyPlan]) -> None:
        """The library is loaded once."""

    def clock_hz(self) -> float | None:
        return None

    def close(self) -> None:
        """NumPy frees what nobody holds."""


def _codes(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Every code but NaN."""
    return rng.integers(0, 0x7F, shape, np.uint8) | (rng.integers(0, 2, shape, np.uint8) << 7)


def _scales(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return np.exp2(rng.uniform(-1, 1, shape)).astype(np.float32)


def _round(exact: Any) -> Any:
    return accuracy.from_bf16(np, accuracy.to_bf16(np, exact.astype(np.float32))).astype(np.float64)


def _view(array: Any) -> native.Tensor:
    codes = {"i": 0, "u": 1, "f": 2}
    view = native.Tensor(device_type=native.CPU, dtype_code=codes[array.dtype.kind], dtype_bits=8 * array.itemsize)
    view.dtype_lanes, view.ndim, view.data = 1, array.ndim, array.ctypes.data
    view.shape[: array.ndim] = array.shape
    view.stride[: array.ndim] = [step // array.itemsize for step in array.strides]
    return view
