"""Whether other kernels are faster than these: `python tests/bench_kernels.py OTHER/native/kernels`.

For some problems and the cost model's best plans of different tiles, both versions are compiled, loaded several times,
checked against the reference kernel and timed in turns on a Hopper GPU, all as the tuner does it: L2 flushed
and other code run before each launch, from the end of that until the next kernel starts. No framework is needed.
`--define` passes macros to the other version, which may be a copy of these with an `#ifdef`.
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

from fp8gemm import backends, compiler, native, planner
from fp8gemm.accuracy import TOLERANCE
from fp8gemm.plan import Kernel, Plan
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

    def kernel(self, plan: Plan) -> Kernel:
        kernel = plan.kernel(native.DENSE)
        return kernel._replace(macros=kernel.macros + self.macros)

    def build(self, plans: Sequence[Plan]) -> None:
        """Into the cache, as many at a time as there are cores."""
        with mock.patch.object(compiler, "sources", return_value=self.sources), ThreadPoolExecutor() as pool:
            list(pool.map(compiler.cubin, {self.kernel(plan) for plan in plans}))

    def entries(self, plan: Plan, found: native.Problem) -> list[native.Entry]:
        """What launches the plan, once for each load of its kernel."""
        with mock.patch.object(compiler, "sources", return_value=self.sources):
            handles = backends.loaded_again(0, self.kernel(plan), plan.shared_bytes, LOADS)
        key = planner.make_key(found)
        return [native.Entry(key=key, kernel=handle.value, plan=plan.native()) for handle in handles]


def timings(rig: Any, versions: Sequence[Version], plans: Sequence[Plan], rounds: int) -> list[list[measure.Timing]]:
    """For each plan the timing of each version; all take turns. `rig`: a GpuRig, whose tables take any key."""
    pairs = list(itertools.product(plans, range(len(versions))))
    for plan, index in pairs:
        rig._entries[plan, index] = itertools.cycle(versions[index].entries(plan, rig._found))
        if not (error := rig.error((plan, index))) <= TOLERANCE:
            print(f"    {versions[index].name} are wrong: {plan}, error {error:.2f} times that of rounding")
    found = [measure.summarise(times) for times in rig.times(pairs, rounds)]
    return [found[i : i + len(versions)] for i in range(0, len(found), len(versions))]


def ratios(target: GpuTarget, versions: Sequence[Version], shape: str, count: int, rounds: int) -> list[float]:
    """The others' time over that of these with each plan of a problem, printed as well."""
    m, n, k = map(int, shape.split("x"))
    (task,) = presets.tasks([presets.problem(native.DENSE, m, n, k)], target.device, None)
    some = space.of_different_tiles(space.kernels(task, target.device), count)
    plans = [plan for plan in some if isinstance(plan, Plan)]
    for version in versions:
        version.build(plans)
    with contextlib.closing(target.rig(task)) as rig:
        timed = timings(rig, versions, plans, rounds)
    print(f"{task.name}, microseconds: these, the others, their ratio")
    found = []
    for plan, (these, others) in zip(plans, timed, strict=True):
        found.append(others.seconds / these.seconds)
        noise = math.hypot(these.spread, others.spread) / these.seconds
        times = f"{1e6 * these.seconds:8.2f} {1e6 * others.seconds:8.2f}"
        print(f"    {times}  {found[-1]:.3f} +- {noise:.3f}  {plan}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("others", type=Path, help="their folder")
    parser.add_argument("--define", action="append", default=[], metavar="NAME=NUMBER", help="a macro for the others")
    parser.add_argument("--shape", default=SHAPES, metavar="MxNxK,...")
    parser.add_argument("--plans", type=int, default=3, help="of each problem (3)")
    parser.add_argument("--rounds", type=int, default=60)
    given = parser.parse_args(arguments)
    macros = tuple((name, int(value)) for name, value in (text.split("=") for text in given.define))
    versions = [Version("these", compiler.sources()), Version("the others", compiler.sources_in(given.others), macros)]
    shapes = given.shape.split(",")
    with contextlib.closing(GpuTarget(0)) as target:
        found = [ratio for shape in shapes for ratio in ratios(target, versions, shape, given.plans, given.rounds)]
    print(f"the others take {statistics.geometric_mean(found):.4f} times as long (geometric mean of {len(found)})")


if __name__ == "__main__":
    main()
