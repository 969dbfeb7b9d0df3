"""The cost model: predicts a plan's time, and so picks the default plan of a problem that nobody has tuned.

A CTA works through its tiles one after another; for each 128 of K the slowest of these sets the pace:

    tensor      the wgmmas of its consumers, at the tensor core's rate
    shared      shared memory: what TMA writes and what every wgmma reads (A once for each, B once for each 64 rows)
    chain       one consumer's own sequence: wgmma, its latency, promotion, barriers. Several consumers overlap, one
                cannot; with two partial sums one's promotion hides behind the next one's wgmma; with operands swapped
                a deep stage's latency comes once
    issue       the producer's TMA instructions; a deep stage's blocks come by one each of A and B
    ingest      the bytes that arrive at the SM, shared by a cluster or not
    L2          the bytes that L2 delivers; a cluster loads what it shares once, and what has to come from HBM passes
                through L2 a second time

every tile adds its epilogue, slices their addition, every split of K its exchange, and the start takes longer the more
is loaded ahead. Waves come out by themselves: a CTA's number of tiles is rounded up. Against all that stands the HBM
time of A, B and D. Units are cycles of the SM, whose rates are the same on every Hopper; SM count and HBM rate are the
device's. The constants below were fitted on an H200 to 20,731 measured (problem, plan) pairs: seven weights, M = 8 ..
8192. There the default was 2.4% slower than the best of these plans in the geometric mean and 12% at worst
(native/README.md). What D's rows in one piece take was set later, from K = 512, what B costs that is asked for again,
from 16 x 4096 x 7168, and what slices cost by hand: 310 to 360 cycles were seen with shared memory's.
"""

import functools
import math

from . import native
from .device import Device
from .plan import K_ASCENDING, TILE_K, Plan, compiled_space
from .problem import Problem

MACS_PER_CYCLE = 4096  # e4m3, one SM: 8192 FLOP per cycle
SHARED_BYTES_PER_CYCLE = 128
SHARED_WRITES = 0.975  # of a write's own cycles
INGEST_BYTES_PER_CYCLE = 55.0
L2_BYTES_PER_CYCLE = 89.0  # one SM's share
L2_CONTENTION = 0.06  # what streaming costs beside anything else: bytes in flight, and power
L2_MISS = 0.32  # of a missed byte's own cost
WGMMA_LATENCY = 176.0
PROMOTION = 2.81  # cycles of an FMA, which competes with the tensor core for registers
BARRIERS = 57.0  # a stage's
STAGE_ISSUE = 1.0
TMA_ISSUE = 93.0
EPILOGUE = 290.0
DIRECT_EPILOGUE, DIRECT_COLUMN = 235.0, 5.4
ADD_SLICES = 200  # beside writing and reading them
STORE_BYTES_PER_CYCLE = {64: 57.7, 32: 22.8, 16: 26.0}  # by gcd(columns, 64): panels of 64, of 32, of all
LAUNCH = 5500  # until the first stage has landed, after the last store, and what two events around it add
BYTE_AHEAD = 0.008  # of a CTA's stages: all SMs' first ones are a queue at the memory, in which scales stand too
LAUNCH_SHARED, LAUNCH_SPLIT = 1450, 120  # clusters that share operands, that split K
EXCHANGE, EXCHANGE_BYTES_PER_CYCLE = 1390, 11.4  # of the sums of a split K
# Share of the SMs that clusters of this size reach on an H200, by where its SMs are. Where fewer clusters run, a
# split that needs them all takes twice as long.
RESIDENT = {1: 1.0, 2: 1.0, 3: 0.89, 4: 0.91}
CLOCK_HZ = 1.75e9  # under load; only its ratio to the memory rate matters
MEMORY_EFFICIENCY = 0.89
AGAIN = 0.05  # of a byte of B's time at the memory, for each further row of tiles that asks for it
HIDDEN = 0.038  # of what another hides: less of it is still better
DEFAULT_BANDWIDTH = 3.35e12
SHARES = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)  # a group's rows over the mean, as tuner/operands.py deals them out


def predict(problem: Problem, plan: Plan, device: Device) -> float:
    """Cycles that the plan should take; infinite where it does not suit the problem."""
    if not suits(problem, plan):
        return math.inf
    groups, rows = _groups(problem)
    tiles = cluster_tiles(problem, plan)
    per_cta = -(-tiles // clusters(plan))
    k_blocks = -(-problem.k // TILE_K)
    turns = math.ceil(math.ceil(k_blocks / plan.turn) / plan.split)
    unique = groups * (rows * problem.k + problem.n * problem.k)
    shared_by = plan.cluster_m * plan.cluster_n
    missed = unique / max(tiles * shared_by * k_blocks, 1)
    compute = per_cta * (turns * plan.turn * block_cycles(plan, rows, missed) + epilogue_cycles(plan))

    bandwidth = (device.memory_bandwidth or DEFAULT_BANDWIDTH) * MEMORY_EFFICIENCY / CLOCK_HZ  # bytes per cycle
    again = max(row_tiles(problem, plan.tile_m) / plan.cluster_m - groups, 0) * problem.n * problem.k
    memory = (unique + AGAIN * again + groups * rows * problem.n * 2) / bandwidth
    ahead = plan.stages * plan.depth * (_loaded_rows(plan, rows) + plan.tile_n) * TILE_K
    start = LAUNCH + BYTE_AHEAD * ahead + (LAUNCH_SHARED if shared_by > 1 else LAUNCH_SPLIT if plan.split > 1 else 0)
    return start + max(compute, memory) + HIDDEN * min(compute, memory)


def suits(problem: Problem, plan: Plan) -> bool:
    """False for deep stages where K is not whole blocks, for kernels of one tile a cluster where there are more, and,
    where there are not, for those with deep stages that walk over tiles."""
    if plan.depth == 1 and not plan.has_one_tile:
        return True
    if plan.depth > 1 and problem.k % TILE_K:
        return False
    fits = problem.kind == native.DENSE and cluster_tiles(problem, plan) <= clusters(plan)
    return fits == plan.has_one_tile


def cluster_tiles(problem: Problem, plan: Plan) -> int:
    """Tiles of D of the plan's clusters; of groups as many as the model assumes. Each group begins a new tile."""
    tiles_m = -(-row_tiles(problem, plan.tile_m) // plan.cluster_m)
    tiles_n = -(-problem.n // (plan.tile_n * plan.cluster_n))
    return tiles_m * tiles_n


@functools.lru_cache(maxsize=64)  # each plan of a problem asks twice, for one of a few heights
def row_tiles(problem: Problem, tile_m: int) -> int:
    """Tiles along M, of all groups. Groups of one size would fit a tile of that height each; real ones do not."""
    if problem.kind in (native.RAGGED, native.MASKED):
        groups, rows = _groups(problem)
        tiles = sum(math.ceil(min(rows * share, problem.m) / tile_m) for share in SHARES)
        return math.ceil(groups * tiles / len(SHARES))
    return -(-max(problem.m, 1) // tile_m)


def clusters(plan: Plan) -> int:
    """How many of the plan's clusters run at a time."""
    return max(round(plan.num_sms * RESIDENT[plan.cluster]) // plan.cluster, 1)


def block_cycles(plan: Plan, rows: int, missed: float) -> float:
    """Cycles that a CTA needs for 128 of K of its tile; `missed`: bytes of it that come from HBM, on average."""
    consumers, waves = plan.consumers, plan.waves
    wgmmas = TILE_K // 32  # m64nNk32
    columns = plan.tile_m if plan.swap_ab else plan.tile_n  # of a wgmma
    tensor = 64 * columns * 32 / MACS_PER_CYCLE
    reads = (64 + columns) * 32 / SHARED_BYTES_PER_CYCLE
    writes = (plan.tile_m + plan.tile_n) * TILE_K / SHARED_BYTES_PER_CYCLE
    multiply, promote = wgmmas * max(tensor, reads), PROMOTION * columns / 2
    items = waves * plan.turn // plan.slices
    if plan.two_partials:
        chain = (items * max(multiply, promote) + promote + WGMMA_LATENCY) / plan.turn + BARRIERS / plan.depth
    elif plan.swap_ab:
        chain = waves * (multiply + promote) + (WGMMA_LATENCY + BARRIERS) / plan.depth
    else:
        chain = waves * (multiply + WGMMA_LATENCY + promote) + BARRIERS / plan.depth
    loads = 3 if plan.depth == 1 and plan.tile_m >= 64 else 2  # A, B, and A's scales
    loaded_rows = _loaded_rows(plan, rows)
    arriving = (loaded_rows + plan.tile_n) * TILE_K
    streamed = (loaded_rows / plan.cluster_n + plan.tile_n / plan.cluster_m) * TILE_K
    pace = max(
        consumers // plan.slices * waves * multiply,
        consumers // plan.slices * waves * wgmmas * reads + SHARED_WRITES * writes,
        chain,
        (TMA_ISSUE * loads + STAGE_ISSUE) / plan.depth,
        arriving / INGEST_BYTES_PER_CYCLE,
        (streamed + L2_MISS * missed) / L2_BYTES_PER_CYCLE,
    )
    return pace + L2_CONTENTION * streamed / L2_BYTES_PER_CYCLE


def _loaded_rows(plan: Plan, rows: int) -> int:
    """Rows of A that a CTA loads for a tile: a short A is not padded."""
    return min(plan.tile_m, -(-rows // 8) * 8)


def epilogue_cycles(plan: Plan) -> float:
    """Cycles from a tile's last wgmma to the consumers' next one."""
    added = ADD_SLICES + plan.tile_m * plan.tile_n * 8 / SHARED_BYTES_PER_CYCLE if plan.slices > 1 else 0
    if plan.staged:
        return added + EPILOGUE + plan.tile_m * plan.tile_n * 2 / STORE_BYTES_PER_CYCLE[math.gcd(plan.tile_n, 64)]
    cycles = added + DIRECT_EPILOGUE + DIRECT_COLUMN * plan.columns
    if plan.split > 1:
        received = plan.tile_m * plan.columns * plan.slices * 4 * (plan.split - 1)
        cycles += EXCHANGE + received / EXCHANGE_BYTES_PER_CYCLE
    return cycles


def _groups(problem: Problem) -> tuple[int, int]:
    """(groups, rows of each) that the model assumes; the true sizes are on the device."""
    if problem.kind == native.DENSE:
        return 1, max(problem.m, 1)
    if problem.expected_m:
        return problem.groups, min(problem.expected_m, max(problem.m, 1))
    return problem.groups, max(problem.m if problem.kind == native.MASKED else -(-problem.m // problem.groups), 1)


def raster(problem: Problem, plan: Plan) -> int:
    """Cluster tiles along M in a band: as square as possible, so that a wave reads the fewest rows of A and B. Of
    one tile a cluster there is one wave, and no band."""
    if plan.has_one_tile:
        return 1
    _, rows = _groups(problem)
    height, width = plan.tile_m * plan.cluster_m, plan.tile_n * plan.cluster_n
    tiles_m = -(-rows // height)
    best = max(1, round(math.sqrt(plan.num_sms / plan.cluster * width / height)))
    bands = max(1, round(tiles_m / best))
    return max(1, -(-tiles_m // bands))


@functools.lru_cache(maxsize=4096)
def default_plan(problem: Problem, device: Device, num_sms: int, batch_invariant: bool = False) -> Plan:
    """The plan with the least predicted time on `num_sms` of the device's SMs; if batch-invariant, of those that sum K
    in ascending order."""
    plans = candidates(problem.kind, device, num_sms, batch_invariant)
    best = min(plans, key=lambda plan: predict(problem, plan, device))
    return best._replace(raster=raster(problem, best))


@functools.lru_cache(maxsize=16)
def candidates(kind: int, device: Device, num_sms: int, batch_invariant: bool = False) -> tuple[Plan, ...]:
    """Every kernel, as a plan on so many SMs; if batch-invariant, those that sum K in ascending order."""
    return tuple(
        plan._replace(num_sms=num_sms)
        for plan in compiled_space(kind, device)
        if plan.cluster <= num_sms and (plan.reduction == K_ASCENDING or not batch_invariant)
    )
