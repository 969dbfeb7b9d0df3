"""The benchmark: quantise, multiply, check and time DeepSeek-V3's weights, beside what a user would otherwise call."""

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from . import compiler, cost, device, native, planner
from .accuracy import Check
from .errors import CompileError
from .gemm import Matrix, gemm_fp8_fp8_bf16_nt
from .peers import default_plan
from .problem import Problem
from .workbench import NumpyBench, Workbench, busy_share, gpu_bench

WEIGHTS = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048), (576, 7168))  # N, K
LARGE = {(32768, 512), (7168, 16384)}  # left out where a CPU has to be quick
H200 = device.Device("NVIDIA H200 (not here)", (9, 0), 132, 60 << 20, 232448, 1.98e9, 4.8e12)
BUILD_PROBLEMS = ((64, 2112, 7168), (64, 24576, 1536), (4096, 2112, 7168), (4096, 576, 7168), (4096, 7168, 16384))

OURS = "fp8gemm"
Say = Callable[[str], None]  # takes a line of progress


class Job(NamedTuple):
    """What to measure: weights (N, K), rows M, rounds of timing, and in words what was left out to be done in time."""

    weights: tuple[tuple[int, int], ...]
    ms: tuple[int, ...]
    rounds: int
    reduced: tuple[str, ...]


class Case(NamedTuple):
    """One product: its plan, its check, seconds of our call and of each peer's."""

    problem: Problem
    plan: str
    check: Check
    repeats: bool  # after the timing the result was the same, bit for bit
    seconds: float
    peers: dict[str, float]

    @property
    def right(self) -> bool:
        return self.check.right and self.repeats

    @property
    def flops_per_second(self) -> float:
        return self.problem.flops / self.seconds

    @property
    def bytes_per_second(self) -> float:
        return self.problem.bytes / self.seconds


class Build(NamedTuple):
    """A kernel compiled for a GPU that need not be here, or why it could not be."""

    problem: Problem
    plan: str
    shared_bytes: int
    built: compiler.Built | None
    error: str | None


class Result(NamedTuple):
    """A whole benchmark. `builds` is empty where a Hopper GPU is present, or no compiler (`compiler_error`)."""

    bench: Workbench
    job: Job
    cases: list[Case]
    busy: float  # share of this machine's cores that others kept busy before the benchmark began
    builds: list[Build]
    compiler: compiler.Compiler | None
    compiler_error: str | None

    @property
    def right(self) -> bool:
        """Whether every result is right and every kernel compiled."""
        return all(case.right for case in self.cases) and all(build.built for build in self.builds)

    @property
    def geometric_means(self) -> dict[str, float]:
        """For each peer its time over ours: the geometric mean over the cases that it ran."""
        names = dict.fromkeys(name for case in self.cases for name in case.peers)
        ratios = {name: [c.peers[name] / c.seconds for c in self.cases if name in c.peers] for name in names}
        return {name: statistics.geometric_mean(values) for name, values in ratios.items()}


def run(
    where: str | None,
    quick: bool,
    weights: Sequence[tuple[int, int]] | None,
    ms: Sequence[int] | None,
    rounds: int | None,
    say: Say,
) -> Result:
    """The benchmark of "cpu", "cuda:1" or (None) the best device; see `plan_job` for what None means elsewhere."""
    bench, busy = open_bench(where), busy_share()
    job = plan_job(bench.device == "cpu", quick, weights, ms, rounds)
    cases = list(measure(bench, job, say))
    builds: list[Build] = []
    made_by, error = None, None
    if not device.hopper_devices():
        try:
            made_by = compiler.compiler()
            builds = list(build_kernels(say))
        except CompileError as failure:
            error = str(failure).splitlines()[0]
    return Result(bench, job, cases, busy, builds, made_by, error)


def plan_job(
    on_cpu: bool,
    quick: bool,
    weights: Sequence[tuple[int, int]] | None = None,
    ms: Sequence[int] | None = None,
    rounds: int | None = None,
) -> Job:
    """What was asked for; for the rest what fits the device: all weights, M = 1, 64 and 4096, less on a CPU."""
    reduced = []
    if weights is None:
        weights = [w for w in WEIGHTS if not (on_cpu and quick and w in LARGE)]
        if len(weights) < len(WEIGHTS):
            left_out = ", ".join(f"{n} x {k}" for n, k in WEIGHTS if (n, k) in LARGE)
            reduced.append(f"--quick on a CPU leaves out N x K = {left_out}")
    if ms is None:
        most = (256 if quick else 512) if on_cpu else 4096
        ms = (1, 64, most)
        if most < 4096:
            reduced.append(f"M goes to {most} instead of 4096")
    if rounds is None:
        rounds = (3 if quick else 5) if on_cpu else (7 if quick else 15)
    return Job(tuple(weights), tuple(ms), rounds, tuple(reduced))


def open_bench(where: str | None) -> Workbench:
    """The workbench of "cpu", "cuda:1", or the best there is. Raises BackendUnavailable for a GPU that cannot serve."""
    where = where or device.best_device()
    return NumpyBench() if where == "cpu" else gpu_bench(int(where.removeprefix("cuda:")))


def measure(bench: Workbench, job: Job, say: Say) -> Iterator[Case]:
    """Every case of the job, as soon as it is done."""
    for n, k in job.weights:
        say(f"{n} x {k}: quantising the weights")
        weights = bench.weights(n, k)
        for m in job.ms:
            say(f"{m} x {n} x {k}: checking and timing")
            yield _case(bench, Problem(native.DENSE, m, n, k), weights, job.rounds)


def _case(bench: Workbench, problem: Problem, weights: Matrix, rounds: int) -> Case:
    activations = bench.activations(problem.m, problem.k)
    d = bench.empty(problem.m, problem.n)
    ours = functools.partial(gemm_fp8_fp8_bf16_nt, activations, weights, d)
    bench.poison(d)
    ours()
    check, first = bench.check(activations, weights, d), bench.copy(d)
    others = default_plan(activations, weights, d) | bench.peers(activations, weights, d)
    seconds = bench.seconds({OURS: ours} | others, rounds)
    bench.poison(d)
    ours()
    return Case(problem, _plan(bench, problem), check, bench.same(d, first), seconds.pop(OURS), seconds)


def _plan(bench: Workbench, problem: Problem) -> str:
    kind, _, number = bench.device.partition(":")
    device_type = native.CPU if kind == "cpu" else native.CUDA
    found = native.Problem(problem.kind, device_type, int(number or 0), problem.m, problem.n, problem.k, 1, 1, 1, 1)
    return str(planner.choose(planner.make_key(found))[0])


def build_kernels(say: Say) -> Iterator[Build]:
    """Compiles the default kernels of a few problems for an H200, here and now: the cache is not asked."""
    seen = set()
    for m, n, k in BUILD_PROBLEMS:
        problem = Problem(native.DENSE, m, n, k)
        plan = cost.default_plan(problem._replace(m=planner.bucket(m)), H200, H200.sms)
        kernel = plan.kernel(native.DENSE)
        if kernel in seen:
            continue
        seen.add(kernel)
        say(f"compiling {plan}")
        built, error = None, None
        try:
            built = compiler.build(kernel)
        except CompileError as failure:
            error = str(failure)
        yield Build(problem, str(plan), plan.shared_bytes, built, error)
