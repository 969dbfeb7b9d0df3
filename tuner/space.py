"""Which plans a sweep tries: first kernels, then in which order their tiles come, then L2 policies and fewer SMs.

Each stage keeps the best plans of the one before. Trying everything with everything would cost a hundred times as much
and, on the problems where it was tried, wins nothing beyond noise.
"""

from collections.abc import Callable, Iterable, Iterator

from fp8gemm import cost, native, planner
from fp8gemm.backends import CpuPlan
from fp8gemm.device import Device
from fp8gemm.layout import ceil_div
from fp8gemm.plan import Plan
from fp8gemm.store import AnyPlan, Task

MOST = 130  # kernels that a sweep tries
SLOWEST = 1.3  # times the best prediction, where a sweep is not of everything
HOPELESS = 3.0  # and where it is
POLICIES = ("evict_normal", "evict_first")  # evict_last gains nothing (native/README.md)
FEW_ROWS = 128  # up to which only the usual policy is tried, and scales count
RASTERS = (0, 0.25, 0.5, 0.75, 1.25, 2, 4)  # times the model's, which knows not what L2 still holds; 1 at least
CPU_TILE_NS = (16, 32, 64, 128, 192, 256)


def predicted(plan: AnyPlan, task: Task, device: Device) -> float | None:
    """The cost model's time, in cycles; None for a CPU, which has no model."""
    return cost.predict(task.problem, plan, device) if isinstance(plan, Plan) else None


def default(task: Task, device: Device) -> AnyPlan:
    """What the problem gets without a tuner."""
    return planner.default_plan(task.problem, device, task.num_sms)


def kernels(task: Task, device: Device, most: int | None = MOST) -> list[AnyPlan]:
    """The first stage, the default first and then as the model ranks them. `most` None: all but the hopeless."""
    first = default(task, device)
    if device.is_cpu:
        others: Iterable[AnyPlan] = (CpuPlan(task.num_sms, tile_n) for tile_n in CPU_TILE_NS)
    else:
        others = _ranked(task, device, most)
    return list(dict.fromkeys([first, *others]))[:most]


def _ranked(task: Task, device: Device, most: int | None) -> Iterator[Plan]:
    problem = task.problem
    plans = cost.candidates(problem.kind, device, task.num_sms)
    times = {plan: cost.predict(problem, plan, device) for plan in plans}  # infinite where they do not suit it
    best = min(times.values())
    for plan in sorted(times, key=times.__getitem__):
        if times[plan] <= (HOPELESS if most is None else SLOWEST) * best:
            yield plan._replace(raster=cost.raster(problem, plan))


def of_different_tiles(plans: Iterable[AnyPlan], count: int) -> list[AnyPlan]:
    """The first `count` plans of which no two have the same tile.

    Plans of one tile are alike, and another tile's may win with another launch: of 4096 x 7168 x 16384 on an H200 two
    kernels of 128 x 128 led at first and ended at 714 us, where one of 256 x 128 on 128 SMs takes 666.
    """
    found: dict[tuple[int, ...], AnyPlan] = {}
    for plan in plans:
        found.setdefault((plan.tile_m, plan.tile_n) if isinstance(plan, Plan) else (plan.tile_n,), plan)
    return list(found.values())[:count]


def rasters(plan: AnyPlan, task: Task) -> list[AnyPlan]:
    """The second stage: the same kernel, its tiles in another order. Nothing is compiled for these."""
    if not isinstance(plan, Plan) or plan.has_one_tile:
        return []
    found = {max(1, int(plan.raster * factor)) for factor in RASTERS} if task.problem.m > plan.tile_m else {1}
    if task.problem.kind == native.DENSE:  # a band that is higher than D is the same launch
        rows = ceil_div(task.problem.m, plan.tile_m * plan.cluster_m)
        found = {min(raster, rows) for raster in found}
    return [plan._replace(raster=raster) for raster in sorted(found - {plan.raster})]


def busy_sms(plan: Plan, task: Task) -> int:
    """How many SMs the plan has tiles for; of groups nobody knows before the launch."""
    if task.problem.kind != native.DENSE:
        return plan.num_sms
    return min(cost.cluster_tiles(task.problem, plan) * plan.cluster, plan.num_sms)


def copies_fewer(plan: AnyPlan, other: AnyPlan, task: Task) -> bool:
    """Whether a lane copies A's scales of fewer rows for each stage (scales.cuh), a stage of several blocks of K."""
    if not isinstance(plan, Plan) or not isinstance(other, Plan):
        return False
    rows, others = (ceil_div(min(tile_m, task.problem.m), 64) for tile_m in (plan.tile_m, other.tile_m))
    return plan.depth > 1 and rows < others


def reads_fewer(plan: AnyPlan, other: AnyPlan, task: Task) -> bool:
    """Whether a plan splits K into the other's tiles, but has consumers that share a stage's blocks: each reads half of
    the scales. Where K is not split, comparisons found nothing for it (docs/tuner.md).
    """
    if not isinstance(plan, Plan) or not isinstance(other, Plan):
        return False
    same = plan._replace(stages=other.stages, depth=other.depth, slices=other.slices) == other
    return same and plan.split > 1 and plan.slices > other.slices


def lighter(task: Task) -> tuple[Callable[[AnyPlan, AnyPlan, Task], bool], ...]:
    """In what a plan may be lighter on A's scales than another, the one that counts more first.

    Of few dense rows, of which it was measured. A sweep hardly sees what scales cost (docs/tuner.md).
    """
    few = task.problem.kind == native.DENSE and task.problem.m <= FEW_ROWS
    return (copies_fewer, reads_fewer) if few else ()


def fewer_sms(plan: AnyPlan, task: Task) -> list[AnyPlan]:
    """The third stage: fewer SMs, and either L2 policy on all and on fewer. With tiles to spare the last wave may not
    need them all, and memory needs fewer still.

    Of few rows only the usual policy: `evict_first` for the weights keeps D in L2 beyond a sample's end, and so leads,
    but costs a graph of seven weights 0.3 to 2.6% (docs/tuner.md).

    Where all tiles are one wave, any number of SMs from its CTAs on is the same launch: of those the least is tried.
    """
    most = task.num_sms
    if not isinstance(plan, Plan):
        return [plan._replace(threads=n) for n in sorted({most // 2, most - 1, most * 3 // 4}) if 1 <= n < most]
    counts = {most - 4, most - 8, most - 16, most - 24, most * 3 // 4, most // 2}
    tiles = cost.cluster_tiles(task.problem, plan)
    clusters = most // plan.cluster
    if clusters:
        waves = ceil_div(tiles, clusters)
        counts.add(ceil_div(tiles, waves) * plan.cluster)  # as many waves, all but the last full
    usable = {n // plan.cluster * plan.cluster for n in counts}
    ctas = busy_sms(plan._replace(num_sms=most), task)
    fitting = [n for n in sorted(usable) if plan.cluster <= n < most and n <= ctas]
    numbers = fitting if ctas in fitting else sorted({*fitting, plan.num_sms})
    policies = POLICIES[:1] if task.problem.kind == native.DENSE and task.problem.m <= FEW_ROWS else POLICIES
    found = [plan._replace(num_sms=n, b_policy=policy) for n in numbers for policy in policies]
    return [fewer for fewer in found if fewer != plan and cost.suits(task.problem, fewer)]
