"""How the rows of a grouped problem are shared out for a measurement: unevenly, as routers do, and always alike."""

from typing import NamedTuple

from fp8gemm import native
from fp8gemm.layout import M_ALIGNMENT, ceil_div
from fp8gemm.problem import Problem


class Piece(NamedTuple):
    """One dense GEMM of a grouped one: rows [first, first + rows) of A (of A's own group if masked) times a weight."""

    group: int
    first: int
    rows: int


def pieces(problem: Problem) -> list[Piece]:
    """What the problem consists of."""
    if problem.kind == native.DENSE:
        return [Piece(0, 0, problem.m)]
    if problem.kind == native.MASKED:
        mean = min(problem.expected_m or problem.m, problem.m)
        return [
            Piece(g, 0, min(rows, problem.m)) for g, rows in enumerate(_uneven(mean * problem.groups, problem.groups))
        ]
    if problem.kind == native.RAGGED:
        found, first = [], 0
        for g, rows in enumerate(_uneven(problem.m, problem.groups)):
            found.append(Piece(g, first, rows))
            first += rows
        return found
    found, first = [], 0
    for g, segments in enumerate(_uneven(ceil_div(problem.m, M_ALIGNMENT), problem.groups)):
        end = min(first + segments * M_ALIGNMENT, problem.m)
        padding = M_ALIGNMENT // 2 if segments > 1 else 0  # what aligning a group costs on average
        if end > first:
            found.append(Piece(g, first, end - first - padding))
        first = end
    return found


def _uneven(total: int, parts: int) -> list[int]:
    """`total` in shares that rise from 0.7 of the mean to 1.3: the range that DeepGEMM's tests draw from, too."""
    weights = [0.7 + 0.6 * (g + 0.5) / parts for g in range(parts)]
    ends = [round(total * sum(weights[: g + 1]) / sum(weights)) for g in range(parts)]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def layout(problem: Problem) -> list[int]:
    """The int32 values of m_indices, group_ends or masked_m; empty if dense."""
    parts = pieces(problem)
    if problem.kind == native.DENSE:
        return []
    if problem.kind == native.MASKED:
        return [part.rows for part in parts]
    if problem.kind == native.RAGGED:
        return [part.first + part.rows for part in parts]
    indices = [-1] * problem.m
    for part in parts:
        indices[part.first : part.first + part.rows] = [part.group] * part.rows
    return indices
