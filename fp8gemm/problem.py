"""A problem: what a plan is chosen for. Kind, sizes and alignment; no pointers."""

import ctypes
from typing import NamedTuple

from . import native

KINDS = ("dense", "contiguous", "ragged", "masked")


class Problem(NamedTuple):
    """One GEMM: A (m, k) e4m3, B (n, k) e4m3, D (m, n) bf16, `groups` weights; m is one group's rows if masked.

    `expected_m` is the host's guess of the rows of one group (0: none), `row_scales` says that A's scales do
    not suit bulk copies, as row-major ones; only the choice of a plan uses them.
    """

    kind: int
    m: int
    n: int
    k: int
    groups: int = 1
    expected_m: int = 0
    row_scales: bool = False

    @property
    def flops(self) -> int:
        """Two per multiply-add of A and B."""
        return 2 * self.rows * self.n * self.k

    @property
    def rows(self) -> int:
        """Rows of A that count: of all groups and, if masked, as many of each as are expected."""
        if self.kind != native.MASKED:
            return self.m
        return self.groups * min(self.expected_m or self.m, self.m)

    @property
    def bytes(self) -> int:
        """A and B read once, D written once; scales are 3% of A and left out."""
        return self.rows * self.k + self.groups * self.n * self.k + 2 * self.rows * self.n


def describe(operands: native.Operands) -> native.Problem:
    """Checks every operand of a call (native/host/problem.cpp) and returns what it found.

    Raises DTypeError, ShapeError, LayoutError or DeviceError, naming the operand, its value and the limit.
    """
    found = native.Problem()
    native.library().describe(ctypes.byref(operands), ctypes.byref(found))
    return found
