"""Plans: what is legal, what the cost model picks, and that the scheduler covers every element of D exactly once."""

import concurrent.futures
import ctypes
import functools
import itertools
import math
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from references import H100, HOPPERS, SMALL, WEIGHTS, Array, ceil_div, m_indices_of, segments

from fp8gemm import PlanError, backends, cost, device, native, plan, planner
from fp8gemm.device import Device
from fp8gemm.plan import Plan, compiled_space
from fp8gemm.problem import KINDS, Problem

KERNELS = Path(__file__).parent.parent / "native" / "kernels"
GOOD = Plan(128, 128, 5, 1, 2, num_sms=132, raster=4)
SWAPPED = {"tile_m": 8, "tile_n": 64, "cluster_n": 1, "swap_ab": 1}
SLICED: dict[str, Any] = {"tile_m": 64, "tile_n": 64, "depth": 2, "slices": 2}
each_device = pytest.mark.parametrize("gpu", HOPPERS, ids=lambda gpu: gpu.name)
each_kind = pytest.mark.parametrize("kind", range(4), ids=KINDS)


# ---- what is legal


def test_legal_plan() -> None:
    assert not list(GOOD.violations(native.DENSE, H100))
    GOOD.check(native.DENSE, H100)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tile_m": 16, "cluster_n": 1}, ["tile_m 16, allowed are (32, 64, 128, 192, 256)"]),
        ({"tile_m": 32}, ["cluster 1 x 2 for tile_m 32, allowed from 64 on"]),
        ({"tile_n": 24}, ["tile_n 24, allowed are (16, "]),
        ({"tile_n": 208, "stages": 2}, ["tile_n 208, allowed"]),
        ({"tile_m": 256, "tile_n": 144, "stages": 2}, ["tile 256 x 144", "do not fit in registers"]),
        ({"cluster_m": 2, "cluster_n": 2}, ["cluster 2 x 2, allowed"]),
        ({"cluster_m": 1, "cluster_n": 4}, ["cluster 1 x 4, allowed"]),
        ({"stages": 1}, ["1 stages, allowed are 2 to 16"]),
        ({"stages": 17, "tile_m": 64, "tile_n": 16}, ["17 stages, allowed are 2 to 16"]),
        ({"split": 5, "cluster_n": 1, "tile_n": 80, "stages": 3}, ["split 5, allowed are (1, 2, 3, 4)"]),
        ({"split": 4, "cluster_n": 1, "tile_n": 16}, ["split 4 of K", "tile_n 16 must be at least 32"]),
        ({"split": 3, "tile_n": 64}, ["cluster of 6 CTAs, allowed are 4"]),
        ({"split": 2}, ["split 2 of K in clusters that share operands, tile_m 128", "64 rows"]),
        (SLICED | {"slices": 3}, ["slices 3, allowed are (1, 2)"]),
        (SLICED | {"tile_m": 128, "stages": 3}, ["slices 2 of tile_m 128, depth 2", "64 rows, a block each"]),
        (SLICED | {"depth": 4, "stages": 3}, ["slices 2 of tile_m 64, depth 4", "64 rows, a block each"]),
        (SLICED | {"cluster_n": 1}, ["slices 2: allowed in clusters and for dense problems"]),
        (SLICED | {"tile_n": 80}, ["slices 2 for tile_n 80: must be a multiple of 32 where K is not split"]),
        ({"one_tile": 2}, ["one_tile 2, allowed are 0 and 1"]),
        ({"one_tile": 1}, ["one_tile, depth 1, split 1: for deep stages of dense problems"]),
        (SLICED | {"one_tile": 1, "split": 2}, ["one_tile, depth 2, split 2", "K not split"]),
        ({"depth": 3, "stages": 2, "tile_n": 64}, ["depth 3, allowed are (1, 2, 4)"]),
        ({"depth": 2, "stages": 2, "tile_n": 144}, ["depth 2 for a tile of 128 x 144, allowed up to 128 x 128"]),
        ({"stages": 7}, ["bytes of shared memory", H100.name, "232448"]),
        ({"num_sms": 1}, ["num_sms 1, allowed are 2 (the cluster) to 132"]),
        ({"num_sms": 133}, ["num_sms 133, allowed are 2 (the cluster) to 132"]),
        ({"raster": 0}, ["raster 0, must be at least 1"]),
        (SWAPPED | {"tile_m": 64}, ["tile_m 64, allowed are (8, 16, 32)"]),
        (SWAPPED | {"swap_ab": 2}, ["swap_ab 2, allowed are 0 and 1"]),
        (SWAPPED | {"tile_n": 80}, ["tile_n 80, allowed are (32, 48, 56, 64, 96, 128)"]),
        (SWAPPED | {"split": 3}, ["split 3 of K with swap_ab"]),
        ({"b_policy": "evict_never"}, ["b_policy 'evict_never', allowed are", "evict_first"]),
    ],
    ids=repr,
)
def test_violations(changes: dict[str, Any], words: list[str]) -> None:
    """Each rule, one at a time: one violation, in words with the value and the limit."""
    broken = GOOD._replace(**changes)
    found = list(broken.violations(native.DENSE, H100))
    assert len(found) == 1, found
    assert all(word in found[0] for word in words), found
    with pytest.raises(PlanError) as caught:
        broken.check(native.DENSE, H100)
    assert found[0] in str(caught.value)


@each_kind
def test_violations_of_groups(kind: int) -> None:
    tall, three = GOOD._replace(tile_m=256, stages=3), GOOD._replace(tile_m=192, stages=3)
    sliced = GOOD._replace(**SLICED)
    for broken, word, kinds in (
        (tall, "aligned to 128 rows only", [native.CONTIGUOUS]),
        (three, "tile_m 192", [native.CONTIGUOUS, native.RAGGED, native.MASKED]),
        (sliced, "for dense problems", [native.CONTIGUOUS, native.RAGGED, native.MASKED]),
    ):
        found = list(broken.violations(kind, H100))
        assert len(found) == (kind in kinds)
        assert all(word in text for text in found)


def test_every_violation_is_told() -> None:
    broken = Plan(100, 50, 100, 3, 3, 3, 7, 4, 0, 2, 1000, -1, "x")
    assert len(list(broken.violations(native.DENSE, H100))) == 13


@each_device
@each_kind
def test_compiled_space(kind: int, gpu: Device) -> None:
    space = compiled_space(kind, gpu)
    assert len(set(space)) == len(space) > 20
    for legal in space:
        assert not list(legal.violations(kind, gpu))
        assert legal.shared_bytes <= gpu.shared_bytes
        assert legal.shared_bytes % 1024 == 0
        more = legal._replace(stages=legal.stages + 1)
        few_rows = legal.tile_m <= 64 and legal.depth > 1
        assert few_rows or list(more.violations(kind, gpu)), "fewer stages than fit"
        assert len({legal.kernel(kind)} & {other.kernel(kind) for other in space if other != legal}) == 0
    tiles = {(legal.tile_m, legal.tile_n) for legal in space if not legal.swap_ab}
    swapped = {(legal.tile_m, legal.tile_n) for legal in space if legal.swap_ab}
    all_swapped = set(itertools.product(plan.SWAPPED_TILE_MS, plan.SWAPPED_TILE_NS))
    assert swapped == (set() if kind == native.CONTIGUOUS else all_swapped)
    assert {tile_n for _, tile_n in tiles} == set(plan.TILE_NS)
    tile_ms = {tile_m for tile_m in plan.TILE_MS if tile_m <= (128 if kind == native.CONTIGUOUS else 256)}
    tile_ms -= {192} if kind != native.DENSE else set()
    assert {tile_m for tile_m, _ in tiles} == tile_ms - ({256} if gpu.shared_bytes < H100.shared_bytes else set())


def test_what_follows_from_a_plan() -> None:
    assert [Plan(m, 16, 2).threads for m in plan.TILE_MS] == [256, 256, 384, 512, 384]
    passed = GOOD.native()
    for name, value in GOOD._asdict().items():
        assert getattr(passed, name) == (plan.L2_POLICIES[value] if name == "b_policy" else value)
    assert (passed.shared_bytes, passed.threads) == (GOOD.shared_bytes, 384)
    assert str(GOOD) == "128x128 stages 5 cluster 1x2 sms 132 raster 4"
    macros = dict(GOOD.kernel(native.MASKED).macros)
    assert macros["SMEM_BYTES"] == GOOD.shared_bytes
    assert (macros["TILE_M"], macros["TILE_N"], macros["STAGES"], macros["KIND"]) == (128, 128, 5, 3)


def test_launch_parameters_compile_nothing() -> None:
    other = GOOD._replace(num_sms=7, raster=9, b_policy="evict_first")
    assert other.kernel(native.DENSE) == GOOD.kernel(native.DENSE)


# ---- what is picked

sizes_m = st.one_of(st.integers(1, 300), st.integers(1, 70000))
problems = st.builds(
    Problem,
    st.integers(0, 3),
    sizes_m,
    st.one_of(st.integers(1, 300), st.integers(1, 130000)),
    st.integers(1, 1100).map(lambda k: 16 * k),
    st.integers(1, 300),
    st.one_of(st.just(0), sizes_m),
)


def test_batch_invariant_plans_do_not_split_k() -> None:
    few_tiles = Problem(native.DENSE, 16, 576, 7168)
    assert cost.default_plan(few_tiles, H100, 132).split > 1
    invariant = cost.default_plan(few_tiles, H100, 132, batch_invariant=True)
    assert (invariant.split, invariant.reduction) == (1, plan.K_ASCENDING)
    assert {p.reduction == plan.K_ASCENDING for p in compiled_space(native.DENSE, H100) if p.split > 1} == {False}


@settings(max_examples=150)
@given(problems, st.sampled_from(HOPPERS), st.data())
def test_default_plan_is_legal(problem: Problem, gpu: Device, data: st.DataObject) -> None:
    num_sms = data.draw(st.one_of(st.just(1), st.just(gpu.sms), st.integers(1, gpu.sms)))
    picked = cost.default_plan(problem, gpu, num_sms)
    assert not list(picked.violations(problem.kind, gpu))
    assert picked.num_sms == num_sms
    assert picked == cost.default_plan(problem, gpu, num_sms)
    assert 0 < cost.predict(problem, picked, gpu) < math.inf
    others = [p._replace(num_sms=num_sms) for p in compiled_space(problem.kind, gpu) if p.cluster <= num_sms]
    assert cost.predict(problem, picked, gpu) == min(cost.predict(problem, p, gpu) for p in others)


def test_one_tile_is_for_one_wave_only() -> None:
    """A cluster that splits K has one tile at most, and tiles of groups are not split: nobody can count them. Deep
    stages that do not split it have a kernel for one tile and one for more."""
    some = [p for p in compiled_space(native.DENSE, H100) if p.has_one_tile]
    others = {p._replace(one_tile=0) for p in some if p.split == 1}
    assert others == {p for p in compiled_space(native.DENSE, H100) if p.depth > 1 and not p.has_one_tile}
    for m, (n, k) in itertools.product((1, 128, 300, 8192), WEIGHTS):
        for p in some:
            tiles = ceil_div(ceil_div(m, p.tile_m), p.cluster_m) * ceil_div(n, p.tile_n * p.cluster_n)
            fits = tiles <= cost.clusters(p)
            problem = Problem(native.DENSE, m, n, k)
            assert (cost.predict(problem, p, H100) < math.inf) == fits
            if p.one_tile:
                assert cost.suits(problem, p._replace(one_tile=0)) != fits
    for kind in (native.CONTIGUOUS, native.RAGGED, native.MASKED):
        assert not any(p.has_one_tile for p in compiled_space(kind, H100))


def test_deep_stages_hold_whole_blocks() -> None:
    """Where the last block of K is not whole, plans have stages of one block, and so has the default."""
    for kind in range(4):
        deep = [p for p in compiled_space(kind, H100) if p.depth > 1 and p.split == 1]
        for k, suit in ((7168, True), (7184, False)):
            problem = Problem(kind, 1, 4096, k, 1)  # of each dense one the kernel with a loop or the one without
            assert {any(cost.suits(problem, p._replace(one_tile=one)) for one in (0, 1)) for p in deep} == {suit}
    assert cost.default_plan(Problem(native.DENSE, 1, 4096, 7168), H100, H100.sms).depth > 1
    assert cost.default_plan(Problem(native.DENSE, 1, 4096, 7184), H100, H100.sms).depth == 1


@settings(max_examples=150)
@given(problems, st.sampled_from(HOPPERS), st.data())
def test_raster(problem: Problem, gpu: Device, data: st.DataObject) -> None:
    """A band is no higher than there are tiles, and bands are of nearly one height; one tile has none."""
    some = data.draw(st.sampled_from(compiled_space(problem.kind, gpu)))
    raster = cost.raster(problem, some)
    if some.has_one_tile:
        assert raster == 1
        return
    _, rows = cost._groups(problem)
    tiles = ceil_div(rows, some.tile_m * some.cluster_m)
    assert 1 <= raster <= tiles
    bands = ceil_div(tiles, raster)
    assert bands * raster - tiles < bands + raster


def test_few_rows_are_one_row_of_tiles() -> None:
    """Two that stream the weights side by side take a quarter longer, and memory hides nothing of it."""
    for m, (n, k) in itertools.product((8, 16, 32), WEIGHTS):
        best = cost.default_plan(Problem(native.DENSE, m, n, k), H100, 132)
        assert best.tile_m >= m or n < 1024, (m, n, k, best)  # with few columns more CTAs are worth more


def test_groups_are_not_all_of_one_size() -> None:
    """A tile as high as the mean group is no default: the weights of larger ones would be read twice."""
    masked = Problem(native.MASKED, 1024, 6144, 7168, 32, 32)
    assert cost.row_tiles(masked, 32) > cost.row_tiles(masked, 64) == 32
    assert cost.default_plan(masked, H100, 132).tile_m == 64
    assert cost.row_tiles(masked._replace(m=32), 32) == 32, "no group has more rows than there are"
    assert cost.row_tiles(Problem(native.RAGGED, 8192, 4096, 7168, 32), 128) > 64
    assert cost.row_tiles(Problem(native.CONTIGUOUS, 10240, 4096, 7168, 32), 128) == 80, "padding and all"
    assert cost.row_tiles(Problem(native.DENSE, 300, 4096, 7168), 128) == 3


@pytest.mark.parametrize(("n", "k"), WEIGHTS)
def test_more_rows_take_longer(n: int, k: int) -> None:
    """And never by a jump: the model has no cliff that a plan of the next size could step over."""
    times = [
        cost.predict(p := Problem(native.DENSE, m, n, k), cost.default_plan(p, H100, 132), H100)
        for m in (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    ]
    for before, after in itertools.pairwise(times):
        assert 0.95 * before < after < 4.1 * before


def test_fewer_sms_are_not_faster() -> None:
    for m, (n, k) in ((64, WEIGHTS[0]), (4096, WEIGHTS[4])):
        p = Problem(native.DENSE, m, n, k)
        times = [cost.predict(p, cost.default_plan(p, H100, sms), H100) for sms in (132, 131, 66, 33, 8, 1)]
        assert all(more < 1.01 * fewer for more, fewer in itertools.pairwise(times))


def test_bucket() -> None:
    buckets = [planner.bucket(m) for m in range(20000)]
    assert buckets == sorted(buckets)
    assert all(m <= bucket < m + 256 and (bucket % 16 == 0 or bucket == 8) for m, bucket in enumerate(buckets))
    assert all(planner.bucket(bucket) == bucket for bucket in set(buckets))


def found(kind: int, m: int, n: int, k: int, groups: int = 1, tma: bool = True) -> native.Problem:
    return native.Problem(kind, native.CUDA, 0, m, n, k, groups, tma, tma)


def test_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "read_device", lambda device_id: SMALL)
    for kind in range(4):
        picked, from_store = planner.choose(planner.make_key(found(kind, 100, 512, 1024, 4), 17))
        assert isinstance(picked, plan.Plan)
        assert not from_store
        assert not list(picked.violations(kind, SMALL))
        assert picked.num_sms == SMALL.sms
    for sms in (1, 3, 16):
        device.set_num_sms(sms)
        picked, _ = planner.choose(planner.make_key(found(0, 100, 512, 1024)))
        assert isinstance(picked, plan.Plan)
        assert picked.num_sms == sms
    for reference in (found(0, 5, 512, 0), found(0, 5, 512, 1024, tma=False)):
        assert planner.choose(planner.make_key(reference)) == (None, False)


@settings(max_examples=100)
@given(st.integers(0, 10000), st.integers(1, 100000), st.integers(1, 128))
def test_cpu_plan(m: int, n: int, threads: int) -> None:
    cpu = Device("a CPU", (0, 0), threads, 0, 0, 0.0, 0.0)
    picked = planner.default_plan(Problem(native.DENSE, m, n, 128), cpu, threads)
    assert isinstance(picked, backends.CpuPlan)
    assert picked.threads == threads
    assert not list(picked.violations(native.DENSE, cpu))


def test_cpu_threads() -> None:
    assert backends.cpu_threads() == len(os.sched_getaffinity(0)) >= 1
    assert str(backends.CpuPlan(2, 64)) == "2 threads, 64 columns"


# ---- the scheduler: a model of native/kernels/scheduler.cuh, and the device code itself, compiled for the host


class Tile(NamedTuple):
    group: int
    row: int
    column: int
    rows: int
    alone: int = 0


class Case(NamedTuple):
    """What the scheduler sees of a launch."""

    kind: int
    tile: tuple[int, int, int, int]  # tile_m, tile_n, cluster_m, cluster_n
    m: int
    n: int
    groups: int
    layout: tuple[int, ...]
    raster: int
    grid: int


def clamp(value: int, limit: int) -> int:
    return min(max(value, 0), limit)


def walk(case: Case, block: int) -> Iterator[Tile]:
    """The tiles of one CTA, by the arithmetic of scheduler.cuh."""
    tile_m, tile_n, cluster_m, cluster_n = case.tile
    cluster, height = cluster_m * cluster_n, tile_m * cluster_m
    columns, rank = ceil_div(case.n, tile_n * cluster_n), block % cluster
    searches = case.kind in (native.RAGGED, native.MASKED)
    row_tiles = list(tiles_along_m(case)) if searches else []
    rows = len(row_tiles) * tile_m if searches else case.m
    for index in range(block // cluster, ceil_div(rows, height) * columns, case.grid // cluster):
        band = index // (case.raster * columns)
        band_rows = min(case.raster, ceil_div(rows, height) - band * case.raster)
        in_band = index - band * case.raster * columns
        m = (band * case.raster + in_band % band_rows) * cluster_m + (rank if cluster_m > 1 else 0)
        n = in_band // band_rows * cluster_n + (rank if cluster_n > 1 else 0)
        tile = Tile(0, m * tile_m, n * tile_n, rows - m * tile_m)
        if searches:
            own, other = (row_tiles[min(t, len(row_tiles) - 1)] for t in (m, m ^ 1))
            missing = m >= len(row_tiles)
            alone = int(cluster_m > 1 and own[0] != other[0])
            yield tile._replace(group=own[0], row=own[1], rows=0 if missing else own[2], alone=alone)
        elif case.kind == native.DENSE:
            yield tile
        elif (found := find_segment(case, tile, rank)) is not None:
            yield found


def tiles_along_m(case: Case) -> Iterator[tuple[int, int, int]]:
    """Ragged and masked: group, first row and rows that are left of it, of each tile along M."""
    for group in range(case.groups):
        start = clamp(case.layout[group - 1], case.m) if case.kind == native.RAGGED and group else 0
        rows = max(clamp(case.layout[group], case.m) - start, 0)
        for row in range(0, rows, case.tile[0]):
            yield group, start + row, rows - row


def find_segment(case: Case, tile: Tile, rank: int) -> Tile | None:
    """Contiguous: the group of a tile and its rows; None if neither CTA of the cluster has work."""
    tile_m, _, cluster_m, _ = case.tile

    def group_of(row: int) -> int:
        group = case.layout[row] if row < case.m else -1
        return group if group < case.groups else -1

    group, alone = group_of(tile.row), 0
    if cluster_m > 1:
        other = group_of(tile.row - tile_m if rank else tile.row + tile_m)
        alone = int(group >= 0 and other >= 0 and group != other)
        if group < 0 <= other:
            return tile._replace(group=other, rows=0)
    if group < 0:
        return None
    rows = case.layout[tile.row : tile.row + min(max(tile.rows, 0), tile_m)].count(group)
    return tile._replace(group=group, rows=rows, alone=alone)


PTX = """
#pragma once
#include <ucontext.h>
#define __device__
struct Dim { int x, y; };
extern Dim threadIdx, blockIdx;
int exchange(int value, int (*pick)(const int* values, int lane, int argument), int argument);
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int __shfl_sync(unsigned, int value, int lane) {
    return exchange(value, [](const int* values, int, int from) { return values[from]; }, lane);
}
inline int __shfl_up_sync(unsigned, int value, int step) {
    return exchange(value, [](const int* values, int lane, int by) { return values[lane - (lane < by ? 0 : by)]; },
                    step);
}
inline int __reduce_add_sync(unsigned, int value) {
    return exchange(value, [](const int* values, int, int) {
        int all = 0;
        for (int i = 0; i < 32; ++i) all += values[i];
        return all;
    }, 0);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
    return exchange(vote, [](const int* values, int, int) {
        unsigned all = 0;
        for (int i = 0; i < 32; ++i) all |= unsigned(values[i]) << i;
        return int(all);
    }, 0);
}
inline bool __any_sync(unsigned, bool vote) { return __ballot_sync(0xffffffff, vote); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
using u32 = unsigned;
using u64 = unsigned long long;
inline int cluster_rank() { return blockIdx.x % (CLUSTER_M * CLUSTER_N); }
"""
HARNESS = """
// A warp on the host: 32 contexts that take turns at each exchange.
#include "scheduler.cuh"
#include <vector>
Dim threadIdx, blockIdx;
namespace {
ucontext_t lanes[32], home;
std::vector<char> stacks(32 << 16);
int values[2][32], turns[32];
fp8gemm::GemmParams params;
int *out, capacity, count, disagreements;

void go_to(int lane) { threadIdx.x = 64 + lane; }     // a lane of the third warp
void body() {
    const int lane = threadIdx.x % 32;
    fp8gemm::Scheduler tiles(params);
    int seen = 0;
    for (fp8gemm::Tile tile; seen < capacity && tiles.next(tile); ++seen) {
        const int fields[] = {tile.group, tile.row, tile.column, tile.rows, tile.alone};
        for (int i = 0; i < 5; ++i) {
            if (lane == 0) out[seen * 5 + i] = fields[i];
            disagreements += out[seen * 5 + i] != fields[i];
        }
    }
    if (lane == 0) count = seen;
    disagreements += count != seen;
    if (lane < 31) go_to(lane + 1), setcontext(&lanes[lane + 1]);
    setcontext(&home);
}
}  // namespace
int exchange(int value, int (*pick)(const int*, int, int), int argument) {
    const int lane = threadIdx.x % 32, turn = turns[lane]++ % 2, next = (lane + 1) % 32;
    values[turn][lane] = value;
    go_to(next);
    swapcontext(&lanes[lane], &lanes[next]);
    return pick(values[turn], lane, argument);
}
extern "C" int quotient(int x, int d) { return fp8gemm::divide(x, fp8gemm::divisor(d)); }
extern "C" int run(int m, int n, int groups, const int* layout, int raster, int grid, int block, int* to, int most) {
    params.m = m, params.n = n, params.groups = groups, params.layout = layout;
    const int height = TILE_M * CLUSTER_M, width = TILE_N * CLUSTER_N;
    set_tiles(params, (m + height - 1) / height, (n + width - 1) / width, raster, grid / (CLUSTER_M * CLUSTER_N));
    blockIdx.x = block, out = to, capacity = most, count = disagreements = 0;
    for (int i = 0; i < 32; ++i) {
        turns[i] = 0;
        getcontext(&lanes[i]);
        lanes[i].uc_stack.ss_sp = &stacks[i << 16], lanes[i].uc_stack.ss_size = 1 << 16;
        makecontext(&lanes[i], body, 0);
    }
    go_to(0);
    swapcontext(&home, &lanes[0]);
    return disagreements ? -1 : count;
}
"""
SCHEDULERS = [
    (native.DENSE, (64, 16, 1, 1)),
    (native.DENSE, (128, 128, 2, 1)),
    (native.DENSE, (256, 112, 1, 2)),
    (native.CONTIGUOUS, (64, 64, 1, 1)),
    (native.CONTIGUOUS, (128, 160, 1, 2)),
    (native.CONTIGUOUS, (128, 112, 2, 1)),
    (native.CONTIGUOUS, (64, 32, 2, 1)),
    (native.RAGGED, (64, 16, 1, 1)),
    (native.RAGGED, (128, 192, 2, 1)),
    (native.RAGGED, (256, 128, 1, 2)),
    (native.MASKED, (64, 64, 1, 1)),
    (native.MASKED, (256, 128, 2, 1)),
    (native.MASKED, (128, 96, 1, 2)),
]
Walk = Callable[[Case, int], list[Tile]]
Libraries = dict[tuple[int, tuple[int, int, int, int]], Any]  # by kind and tile


@pytest.fixture(scope="module")
def schedulers(tmp_path_factory: pytest.TempPathFactory) -> Libraries:
    """scheduler.cuh itself, compiled by g++ for a warp on the host."""
    folder = tmp_path_factory.mktemp("scheduler")
    for name in ("scheduler.cuh", "cluster.cuh", "plan.cuh", "params.h"):
        (folder / name).write_text((KERNELS / name).read_text())
    (folder / "ptx.cuh").write_text(PTX)
    (folder / "harness.cpp").write_text(HARNESS)

    def compile(kind: int, tile: tuple[int, int, int, int]) -> Any:
        macros = dict(Plan(tile[0], tile[1], 2, *tile[2:]).kernel(kind).macros)
        macros.pop("SMEM_BYTES")  # no storage here
        library = folder / f"{kind}_{'_'.join(map(str, tile))}.so"
        defined = [f"-D{name}={value}" for name, value in macros.items()]
        flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", *defined, "-o", str(library)]
        subprocess.run(["g++", "harness.cpp", *flags], cwd=folder, check=True)
        return ctypes.CDLL(str(library))

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        built = list(pool.map(lambda key: compile(*key), SCHEDULERS))
    return dict(zip(SCHEDULERS, built, strict=True))


@pytest.fixture(scope="module")
def device_code(schedulers: Libraries) -> Walk:
    def run(case: Case, block: int) -> list[Tile]:
        layout = (ctypes.c_int * max(len(case.layout), 1))(*case.layout)
        most = 1 << 15
        out = (ctypes.c_int * (5 * most))()
        sizes = case.m, case.n, case.groups
        count = schedulers[case.kind, case.tile].run(*sizes, layout, case.raster, case.grid, block, out, most)
        assert 0 <= count < most, "the lanes of a warp disagree, or there is no end"
        return [Tile(*out[5 * i : 5 * i + 5]) for i in range(count)]

    return run


@given(st.integers(0, 2**31 - 1), st.integers(1, 2**31 - 1))
@example(2**31 - 1, 1)
@example(2**31 - 1, 2**31 - 1)
@example(2**31 - 2, 2**31 - 1)
@example(2**30 - 1, 2**30)
def test_division_by_a_multiplication(schedulers: Libraries, x: int, d: int) -> None:
    """What divides a tile's number is exact, to the last number before each multiple too."""
    for number in (x, x // d * d, max(x // d * d - 1, 0), 2**31 - 1):
        assert schedulers[SCHEDULERS[0]].quotient(number, d) == number // d


@st.composite
def cases(draw: st.DrawFn, nonsense: bool = False) -> Case:
    kind, tile = draw(st.sampled_from(SCHEDULERS))
    size = st.one_of(st.just(0), st.just(1), st.sampled_from([64, 128, 256, 257]), st.integers(0, 700))
    sizes = draw(st.lists(size, min_size=1, max_size=draw(st.sampled_from([1, 5, 33, 70]))))
    if sum(sizes) > 6000:
        sizes = [size % 90 for size in sizes]
    groups, spare = len(sizes), draw(st.integers(0, 200))
    m = {native.MASKED: max(sizes) + spare, native.CONTIGUOUS: segments(sizes)[1]}.get(kind, sum(sizes) + spare)
    layout: Array = {
        native.CONTIGUOUS: m_indices_of(sizes),
        native.RAGGED: np.cumsum(sizes),
        native.MASKED: np.array(sizes),
    }.get(kind, np.zeros(0, int))
    if nonsense:
        wrong = st.sampled_from([-(2**31), -1, 0, 1, groups - 1, groups, m - 1, m, m + 1, 2**31 - 1])
        layout = np.array([draw(wrong) for _ in range(len(layout))], int)
    n = draw(st.one_of(st.integers(1, 40), st.integers(1, 900)))
    cluster = tile[2] * tile[3]
    grid = draw(st.one_of(st.integers(1, 9), st.integers(1, 132))) * cluster
    return Case(kind, tile, m, n, groups, tuple(layout.tolist()), draw(st.integers(1, 20)), grid)


def check_case(case: Case, device_code: Walk, nonsense: bool) -> None:
    planes = case.groups if case.kind == native.MASKED else 1
    covered = np.zeros((planes, case.m, case.n), np.int32)
    weights = np.full((planes, case.m), -1)
    tile_m, tile_n, cluster_m, cluster_n = case.tile
    cluster = cluster_m * cluster_n
    walks = []
    for block in range(case.grid):
        tiles = list(walk(case, block))
        if block < 8 or block >= case.grid - 2:
            assert device_code(case, block) == tiles
        walks.append(tiles)
        for tile in tiles:
            assert 0 <= tile.group < case.groups
            rows = min(tile.rows, tile_m)
            if rows <= 0 or tile.column >= case.n:
                continue  # the other half of a cluster's last tile
            assert tile.row >= 0
            assert tile.row + rows <= case.m
            plane = tile.group if case.kind == native.MASKED else 0
            own = slice(tile.row, tile.row + rows)
            covered[plane, own, tile.column : tile.column + tile_n] += 1
            weights[plane, own] = tile.group
    for first in range(0, case.grid, cluster):
        members = walks[first : first + cluster]
        assert len({len(tiles) for tiles in members}) == 1, "CTAs of one cluster part: they would wait for ever"
        for step in zip(*members, strict=True):
            assert len({tile.alone for tile in step}) == 1
            assert step[0].alone or len({tile.group for tile in step}) == 1, "the weights they share are not the same"
    if nonsense:
        return
    expected = np.full((planes, case.m), -1)
    for group in range(case.groups):
        if case.kind == native.MASKED:
            expected[group, : case.layout[group]] = group
        elif case.kind == native.RAGGED:
            expected[0, case.layout[group - 1] if group else 0 : case.layout[group]] = group
    if case.kind == native.DENSE:
        expected[:] = 0
    elif case.kind == native.CONTIGUOUS:
        expected[0] = case.layout
    np.testing.assert_array_equal(weights, expected)
    np.testing.assert_array_equal(covered, np.broadcast_to((expected >= 0)[..., None], covered.shape))


@settings(max_examples=150)
@given(case=cases())
def test_scheduler_covers_everything_once(device_code: Walk, case: Case) -> None:
    if case.kind == native.DENSE:
        case = case._replace(groups=1)
    check_case(case, device_code, nonsense=False)


@settings(max_examples=80)
@given(case=cases(nonsense=True).filter(lambda case: case.kind != native.DENSE))
def test_scheduler_stays_inside_whatever_the_groups_say(device_code: Walk, case: Case) -> None:
    check_case(case, device_code, nonsense=True)


@pytest.mark.parametrize("groups", [31, 32, 33, 64, 65, 97])
@pytest.mark.parametrize(("kind", "tile"), [key for key in SCHEDULERS if key[0] in (native.RAGGED, native.MASKED)])
def test_scheduler_finds_groups_past_a_warp(
    device_code: Walk, kind: int, tile: tuple[int, int, int, int], groups: int
) -> None:
    """A warp looks at 32 groups at a time: the last of a window, the first of the next, windows of empty groups."""
    for sizes in (
        [1] * groups,
        [0] * (groups - 1) + [300],
        [200 * (group % 32 in (0, 31)) for group in range(groups)],
        [3] * (groups - 1) + [0],
    ):
        m = sum(sizes) if kind == native.RAGGED else max(sizes)
        layout = itertools.accumulate(sizes) if kind == native.RAGGED else sizes
        check_case(Case(kind, tile, m, 40, groups, tuple(layout), 2, 6), device_code, nonsense=False)


@pytest.mark.parametrize("groups", [97, 200])
@pytest.mark.parametrize(("kind", "tile"), [key for key in SCHEDULERS if key[0] in (native.RAGGED, native.MASKED)])
def test_scheduler_goes_back_in_high_bands(
    device_code: Walk, kind: int, tile: tuple[int, int, int, int], groups: int
) -> None:
    """A band of more groups than a warp looks at: its next column begins windows before."""
    sizes = [1 + 150 * (group % 3 == 0) for group in range(groups)]
    m = sum(sizes) if kind == native.RAGGED else max(sizes)
    layout = itertools.accumulate(sizes) if kind == native.RAGGED else sizes
    case = Case(kind, tile, m, 700, groups, tuple(layout), 100, 2 * tile[2] * tile[3])
    found = [tile.group // 32 for tile in walk(case, 0)]
    assert any(after < before for before, after in itertools.pairwise(found))
    check_case(case, device_code, nonsense=False)


def test_scheduler_walks_bands(device_code: Walk) -> None:
    """Down each column of a band of `raster` rows, then the next column."""
    case = Case(native.DENSE, (64, 16, 1, 1), 5 * 64, 3 * 16, 1, (), raster=2, grid=1)
    order = [(tile.row // 64, tile.column // 16) for tile in device_code(case, 0)]
    bands = [[(row, column) for column in range(3) for row in rows] for rows in ((0, 1), (2, 3), (4,))]
    assert order == functools.reduce(list.__add__, bands)
