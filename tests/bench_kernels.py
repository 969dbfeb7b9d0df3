"""Whether other kernels are faster than these: `python tests/bench_kernels.py OTHER/native/kernels ...`.

For some problems, all versions are compiled for the cost model's best plans of different tiles, or for those named by
`--plan tile_m=128,tile_n=192,stages=4`, loaded several times, checked against the reference kernel and timed in turns
on a Hopper GPU, all as the tuner does it: by CUDA events around each launch, L2 flushed and other code run before. No
framework is needed. `--define` passes macros to the other versions, which may be copies of these with an `#ifdef`.
"""

import argparse
import contextlib
import itertools
import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from fp8gemm import backends, compiler, cost, native, planner
from fp8gemm.accuracy import TOLERANCE
from fp8gemm.device import Device
from fp8gemm.plan import Kernel, Plan
from fp8gemm.problem import KINDS
from fp8gemm.store import Task
from fp8gemm.tuner import measure, presets, space
from fp8gemm.tuner.gpu import LOADS, GpuTarget

SHAPES = (
    "1x4096x7168,16x2112x7168,64x4096x7168,128x576x7168,256x2112x7168,1024x7168x2048,4096x24576x1536,4096x4096x7168"
)


class Version(NamedTuple):
    """Kernels by file name and text, and macros beside those of the plan."""

    name: str
    sources: dict[str, str]
    macros: tuple[tuple[str, int], ...] = ()

    def kernel(self, plan: Plan, kind: int) -> Kernel:
        kernel = plan.kernel(kind)
        return kernel._replace(macros=kernel.macros + self.macros)

    def build(self, plans: Sequence[Plan], kind: int) -> None:
        """Into the cache, as many at a time as there are cores."""
        with mock.patch.object(compiler, "sources", return_value=self.sources), ThreadPoolExecutor() as pool:
            list(pool.map(compiler.cubin, {self.kernel(plan, kind) for plan in plans}))

    def entries(self, plan: Plan, found: native.Problem) -> list[native.Entry]:
        """What launches the plan, once for each load of its kernel."""
        with mock.patch.object(compiler, "sources", return_value=self.sources):
            handles = backends.loaded_again(0, self.kernel(plan, found.kind), plan.shared_bytes, LOADS)
        key = planner.make_key(found)
        return [native.Entry(key=key, kernel=handle.value, plan=plan.native()) for handle in handles]


def timings(rig: Any, versions: Sequence[Version], plans: Sequence[Plan], rounds: int) -> list[list[measure.Timing]]:
    """For each plan the timing of each version; all take turns. `rig`: a GpuRig, whose tables take any key."""
    pairs = list(itertools.product(plans, range(len(versions))))
    for plan, index in pairs:
        rig.add((plan, index), versions[index].entries(plan, rig._found))
        if not (error := rig.error((plan, index))) <= TOLERANCE:
            print(f"    {versions[index].name} are wrong: {plan}, error {error:.2f} times that of rounding")
    found = [measure.summarise(times) for times in rig.times(pairs, rounds)]
    return [found[i : i + len(versions)] for i in range(0, len(found), len(versions))]


def named(text: str, task: Task, device: Device) -> Plan:
    """The plan of these fields, on all SMs and with the model's raster unless it says otherwise."""
    fields: dict[str, Any] = dict(field.split("=") for field in text.split(","))
    for name in fields.keys() - {"b_policy"}:
        fields[name] = int(fields[name])
    plan = Plan(**{"num_sms": task.num_sms} | fields)
    plan.check(task.problem.kind, device)
    return plan if "raster" in fields else plan._replace(raster=cost.raster(task.problem, plan))


def compare(
    target: GpuTarget, versions: Sequence[Version], task: Task, plans: Sequence[Plan], rounds: int
) -> list[list[float]]:
    """The others' times over that of these with each plan of a problem, printed as well."""
    for version in versions:
        version.build(plans, task.problem.kind)
    with contextlib.closing(target.rig(task)) as rig:
        timed = timings(rig, versions, plans, rounds)
    print(f"{task.name}, microseconds: {', '.join(version.name for version in versions)}; their ratios to the first")
    found = []
    for plan, (these, *others) in zip(plans, timed, strict=True):
        found.append([other.seconds / these.seconds for other in others])
        noise = max(math.hypot(these.spread, other.spread) for other in others) / these.seconds
        times = " ".join(f"{1e6 * timing.seconds:8.2f}" for timing in (these, *others))
        print(f"    {times}  {' '.join(f'{ratio:.3f}' for ratio in found[-1])} +- {noise:.3f}  {plan}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("others", type=Path, nargs="+", help="their folders")
    parser.add_argument("--define", action="append", default=[], metavar="NAME=NUMBER", help="a macro for the others")
    parser.add_argument("--shape", default=SHAPES, metavar="MxNxK,...")
    parser.add_argument("--kind", default="dense", choices=KINDS)
    parser.add_argument("--groups", type=int, default=1, help="weights of a grouped problem")
    parser.add_argument("--expected-m", type=int, default=0, help="rows of a masked group, as calls pass it")
    parser.add_argument("--row-scales", action="store_true", help="A's scales lie row-major")
    parser.add_argument("--plan", action="append", default=[], metavar="FIELD=VALUE,...", help="in place of --plans")
    parser.add_argument("--plans", type=int, default=3, help="of each problem (3)")
    parser.add_argument("--rounds", type=int, default=60)
    given = parser.parse_args(arguments)
    macros = tuple((name, int(value)) for name, value in (text.split("=") for text in given.define))
    others = [Version(str(folder), compiler.sources_in(folder), macros) for folder in given.others]
    versions = [Version("these", compiler.sources()), *others]
    ratios: list[list[float]] = []
    with contextlib.closing(GpuTarget(0)) as target:
        for shape in given.shape.split(","):
            kind, (m, n, k) = KINDS.index(given.kind), map(int, shape.split("x"))
            problem = presets.called(kind, m, n, k, given.groups, given.expected_m, given.row_scales)
            (task,) = presets.tasks([problem], target.device, None)
            plans = [named(text, task, target.device) for text in given.plan]
            if not plans:
                best = space.of_different_tiles(space.kernels(task, target.device), given.plans)
                plans = [plan for plan in best if isinstance(plan, Plan)]
            ratios += compare(target, versions, task, plans, given.rounds)
    for version, found in zip(others, zip(*ratios, strict=True), strict=True):
        mean = statistics.geometric_mean(found)
        print(f"{version.name} take {mean:.4f} times as long (geometric mean of {len(found)})")


if __name__ == "__main__":
    main()
