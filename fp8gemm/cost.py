"""The cost model: predicts a plan's time, and so picks the default plan of a problem that nobody has tuned.

A CTA works through its tiles one after another; for each 128 of K the slowest of these sets the pace:

    tensor      the wgmmas of all its consumers: tensor core rate, or shared-memory reads where tiles are narrow
    consumer    one consumer's own chain: wgmma, its latency, promotion. Two consumers overlap, one cannot
    L2          the bytes that the CTA streams in; a cluster loads what it shares once
    HBM         those bytes of A and B that are new to L2, over what the SMs can keep in flight

and every tile adds its epilogue. Waves come out by themselves: a CTA's number of tiles is rounded up.
Rates are of the Hopper SM (cycles), or of the device; constants are fitted (native/README.md has the log).
"""

import functools
import math

from . import native
from .device import Device
from .plan import TILE_K, Plan, compiled_space
from .problem import Problem

MACS_PER_CYCLE = 4096  # e4m3, one SM: 8192 FLOP per cycle
SHARED_BYTES_PER_CYCLE = 128
L2_BYTES_PER_CYCLE = 42  # one SM's share
WGMMA_LATENCY = 70  # cycles from the last wgmma's end to its registers being free for the next block
PROMOTION_OVERHEAD = 30  # barrier, scales, loop
EPILOGUE = 400  # cycles of a tile besides its stores
EPILOGUE_BYTES_PER_CYCLE = 40
FILL = 1500  # cycles from launch to the first stage
CLOCK_HZ = 1.75e9  # under load; only its ratio to the memory rate matters
MEMORY_EFFICIENCY = 0.9
MEMORY_LATENCY = 1100  # cycles
DEFAULT_BANDWIDTH = 3.35e12


def predict(problem: Problem, plan: Plan, device: Device) -> float:
    """Cycles that the plan should take."""
    groups, rows = _groups(problem)
    k_blocks = -(-problem.k // TILE_K)
    tiles_m = -(-rows // (plan.tile_m * plan.cluster_m))
    tiles_n = -(-problem.n // (plan.tile_n * plan.cluster_n))
    clusters = plan.num_sms // plan.cluster
    tiles = groups * tiles_m * tiles_n
    per_cta = -(-tiles // clusters)

    consumers = 1 if plan.tile_m == 64 else 2
    waves = plan.tile_m // (64 * consumers)
    wgmma = 4 * max(plan.tile_n / 2, (64 * 32 + plan.tile_n * 32) / SHARED_BYTES_PER_CYCLE)
    tensor = consumers * waves * wgmma
    chain = waves * (wgmma + WGMMA_LATENCY + plan.tile_n / 2 + PROMOTION_OVERHEAD)
    loaded = (plan.tile_m / plan.cluster_n + plan.tile_n / plan.cluster_m) * TILE_K
    block = max(tensor, chain, loaded / L2_BYTES_PER_CYCLE)
    epilogue = EPILOGUE + plan.tile_m * plan.tile_n * 2 / EPILOGUE_BYTES_PER_CYCLE
    compute = per_cta * (k_blocks * block + epilogue)

    bandwidth = (device.memory_bandwidth or DEFAULT_BANDWIDTH) * MEMORY_EFFICIENCY / CLOCK_HZ  # bytes per cycle
    busy = min(tiles, clusters) * plan.cluster
    in_flight = busy * plan.stages * (plan.tile_m + plan.tile_n) * TILE_K / MEMORY_LATENCY
    unique = groups * (rows * problem.k + problem.n * problem.k)
    # CTAs without a last tile leave the memory to the others, so bytes are shared by the time that tiles need.
    share = per_cta * clusters / tiles if tiles > clusters else 1.0
    memory = unique / min(bandwidth, in_flight) * min(share, 1.3) + groups * rows * problem.n * 2 / bandwidth
    return FILL + max(compute, memory) + 0.2 * min(compute, memory)


def _groups(problem: Problem) -> tuple[int, int]:
    """(groups, rows of each) that the model assumes; the true sizes are on the device."""
    if problem.kind == native.DENSE:
        return 1, max(problem.m, 1)
    if problem.kind == native.MASKED:
        return problem.groups, max(problem.expected_m or problem.m, 1)
    if problem.expected_m:
        return problem.groups, problem.expected_m
    return problem.groups, max(-(-problem.m // problem.groups), 1)


def raster(problem: Problem, plan: Plan) -> int:
    """Cluster tiles along M in a band: as square as possible, so that a wave reads the fewest rows of A and B."""
    _, rows = _groups(problem)
    height, width = plan.tile_m * plan.cluster_m, plan.tile_n * plan.cluster_n
    tiles_m = -(-rows // height)
    best = max(1, round(math.sqrt(plan.num_sms / plan.cluster * width / height)))
    bands = max(1, round(tiles_m / best))
    return max(1, -(-tiles_m // bands))


@functools.lru_cache(maxsize=4096)
def default_plan(problem: Problem, device: Device, num_sms: int) -> Plan:
    """The plan with the least predicted time on `num_sms` of the device's SMs."""
    candidates = [p._replace(num_sms=num_sms) for p in compiled_space(problem.kind, device) if p.cluster <= num_sms]
    best = min(candidates, key=lambda plan: predict(problem, plan, device))
    return best._replace(raster=raster(problem, best))
