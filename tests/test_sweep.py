"""The sweep: which plans, how they race, that wrong ones never win, what is published."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from references import H100, HOPPERS, WEIGHTS

from fp8gemm import BackendUnavailable, OperandError, backends, cost, native, planner, store
from fp8gemm.backends import CpuPlan
from fp8gemm.device import Device
from fp8gemm.errors import DriverError
from fp8gemm.plan import Plan, compiled_space
from fp8gemm.problem import Problem
from fp8gemm.store import AnyPlan, Task
from fp8gemm.tuner import cpu, measure, operands, presets, space, tune
from fp8gemm.tuner.gpu import judge
from fp8gemm.tuner.measure import Race, Rig, Timing
from fp8gemm.tuner.sweep import FINAL, Outcome, Sweep, as_fast
from fp8gemm.tuner.target import CpuTarget, open_target
from fp8gemm.tuner.writer import Stamp, Writer

CPU = Device("a CPU", (0, 0), 8, 0, 0, 0.0, 0.0)
PROBLEM = Problem(native.DENSE, 64, 512, 512)
TASK = Task(PROBLEM, CPU.name, CPU.sms, CPU.sms)


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FP8GEMM_CACHE_DIR", str(tmp_path))
    return tmp_path


class FakeRig:
    """Times by a formula with noise; `errors`: plans that are wrong, `failing`: plans that cannot run."""

    def __init__(self, seconds: Callable[[AnyPlan], float], noise: float = 0.01, seed: int = 0) -> None:
        self.seconds, self.noise, self.random = seconds, noise, random.Random(seed)
        self.errors: dict[AnyPlan, float] = {}
        self.failing: set[AnyPlan] = set()
        self.disturbed: Iterator[bool] = itertools.repeat(False)
        self.timed: list[AnyPlan] = []
        self.renewed: list[AnyPlan] = []
        self.closed = False

    def error(self, plan: AnyPlan) -> float:
        if plan in self.failing:
            raise DriverError("too many resources requested")
        return self.errors.get(plan, 1.0)

    def times(self, plans: Sequence[AnyPlan], rounds: int) -> list[list[float]]:
        self.timed += plans
        if next(self.disturbed):
            return [[] for _ in plans]
        spread = 1 + self.noise
        return [[self.seconds(p) * self.random.uniform(1 / spread, spread) for _ in range(rounds)] for p in plans]

    def renew(self, plans: Sequence[AnyPlan]) -> None:
        self.renewed = list(plans)

    def clock_hz(self) -> float | None:
        return 1.5e9

    def close(self) -> None:
        self.closed = True


class FakeTarget(CpuTarget):
    """A CPU of 8 cores with a rig of the test's choice; `unbuildable`: plans that do not compile."""

    def __init__(self, rig: FakeRig, device: Device = CPU) -> None:
        self.device, self.stamp, self.fake = device, Stamp("c", "d", "s"), rig
        self.unbuildable: dict[AnyPlan, str] = {}

    def rig(self, task: Task) -> Rig:
        return self.fake

    def build(self, plans: Sequence[AnyPlan], *_: Any) -> dict[AnyPlan, str]:
        return {plan: why for plan, why in self.unbuildable.items() if plan in plans}


def sweep(rig: FakeRig, task: Task = TASK, device: Device = CPU, **options: Any) -> Outcome:
    with Writer() as writer:
        return Sweep(FakeTarget(rig, device), writer, task, lambda: False, lambda _: None, **options).run()


def by_columns(best: int) -> Callable[[AnyPlan], float]:
    """The nearer tile_n is to `best`, and the more threads, the faster: 20% a step."""
    return lambda p: 1e-3 * (1 + 0.2 * abs(space.CPU_TILE_NS.index(p.tile_n) - best)) * (8 / p.num_sms) ** 0.5


def two_ahead(first: Plan, lead: float, second: Plan) -> Callable[[AnyPlan], float]:
    """Two kernels take half as long as all others, the first one less than the second by this part of its time."""

    def seconds(p: AnyPlan) -> float:
        assert isinstance(p, Plan)
        kernel = p.kernel(0)
        return 1e-5 * (2 - (kernel == second.kernel(0)) - (1 + lead) * (kernel == first.kernel(0)))

    return seconds


# ---- the space ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", HOPPERS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("kind", range(4))
def test_what_a_sweep_tries_is_legal(gpu: Device, kind: int) -> None:
    for m, (n, k), limit in itertools.product((16, 256, 4096), WEIGHTS[:3], (gpu.sms, gpu.sms // 2 + 1, 2)):
        task = Task(Problem(kind, m, n, k, 4 if kind else 1, 16 if kind == 3 else 0), gpu.name, gpu.sms, limit)
        first = space.kernels(task, gpu)
        assert first[0] == planner.default_plan(task.problem, gpu, limit)
        assert 1 < len(first) <= space.MOST
        assert len(set(first)) == len(first)
        guesses = [space.predicted(plan, task, gpu) or 0 for plan in first]
        assert guesses == sorted(guesses)
        later = [plan for best in first[:2] for more in (space.rasters, space.fewer_sms) for plan in more(best, task)]
        for plan in [*first, *later]:
            assert not list(plan.violations(kind, gpu))
            assert plan.num_sms <= limit
            assert math.isfinite(space.predicted(plan, task, gpu) or 0), "K split for more than one wave"
        kernels = {plan.kernel(kind) for plan in first if isinstance(plan, Plan)}
        assert {plan.kernel(kind) for plan in later if isinstance(plan, Plan)} <= kernels, "compiles in a later stage"


def test_other_launches_are_other_launches() -> None:
    """112 tiles are one wave on 112 SMs and more; three rows of cluster tiles make no band of four."""
    task = Task(Problem(0, 16, 7168, 2048), H100.name, H100.sms, H100.sms)
    plan = Plan(16, 64, 4, depth=2, swap_ab=1, num_sms=H100.sms)
    one = plan._replace(one_tile=1)
    assert space.fewer_sms(one, task) == [one._replace(num_sms=112)], "of few rows with one policy"
    fewer = space.fewer_sms(plan._replace(swap_ab=0, tile_m=32), task._replace(problem=Problem(0, 16, 24576, 2048)))
    counts = [other.num_sms for other in fewer if isinstance(other, Plan)]
    assert counts == sorted(set(counts)) != []
    assert {other.b_policy for other in fewer if isinstance(other, Plan)} == {"evict_normal"}
    grouped = Task(Problem(native.MASKED, 16, 7168, 2048, groups=8, expected_m=16), H100.name, H100.sms, H100.sms)
    for more in (task._replace(problem=task.problem._replace(m=space.FEW_ROWS + 1)), grouped):
        found = [other for other in space.fewer_sms(plan, more) if isinstance(other, Plan)]
        numbers = {other.num_sms for other in found}
        either = {plan._replace(num_sms=n, b_policy=policy) for n in numbers for policy in space.POLICIES}
        assert len(set(found)) == len(found)
        assert set(found) == either - {plan}, "each with either policy"
    many = Task(Problem(0, 4096, 7168, 2048), H100.name, H100.sms, H100.sms)
    pairs = Plan(128, 128, 5, cluster_m=2, num_sms=H100.sms, raster=2)
    assert pairs._replace(b_policy="evict_first") in space.fewer_sms(pairs, many)
    assert pairs not in space.fewer_sms(pairs, many)
    high = Task(Problem(0, 600, 7168, 2048), H100.name, H100.sms, H100.sms)
    found = [other for other in space.rasters(pairs, high) if isinstance(other, Plan)]
    assert [other.raster for other in found] == [1, 3]
    large = Task(Problem(0, 8192, 7168, 2048), H100.name, H100.sms, H100.sms)
    found = [other for other in space.rasters(pairs._replace(raster=8), large) if isinstance(other, Plan)]
    assert [other.raster for other in found] == [1, 2, 4, 6, 10, 16, 32]


def test_the_whole_space() -> None:
    task = Task(Problem(0, 64, 2112, 7168), H100.name, H100.sms, H100.sms)
    whole = space.kernels(task, H100, None)
    tried = {plan.kernel(0) for plan in whole if isinstance(plan, Plan)}
    times = {plan: cost.predict(task.problem, plan, H100) for plan in compiled_space(0, H100)}
    possible = [plan for plan, time in times.items() if time <= space.HOPELESS * min(times.values())]
    assert tried == {plan.kernel(0) for plan in possible}
    assert 0 < sum(plan.split > 1 for plan in possible) < len(possible) < len(compiled_space(0, H100))


def test_finalists_are_of_different_tiles() -> None:
    plans = [Plan(128, 128, 5, 2, 1), Plan(128, 128, 5, 1, 2), Plan(256, 128, 3), Plan(128, 192, 4), Plan(64, 64, 4)]
    assert space.of_different_tiles(plans, 3) == [plans[0], plans[2], plans[3]]
    assert space.of_different_tiles(plans[:2], 3) == plans[:1]
    assert space.of_different_tiles([CpuPlan(2, 64), CpuPlan(1, 64), CpuPlan(1, 32)], 2) == [
        CpuPlan(2, 64),
        CpuPlan(1, 32),
    ]


# ---- the race -------------------------------------------------------------------------------------------------------


def race(
    rig: FakeRig, plans: Sequence[AnyPlan], keep: Sequence[AnyPlan] = (), **options: Any
) -> tuple[Any, list[AnyPlan]]:
    dropped: list[AnyPlan] = []
    found = Race(rig, plans, keep, lambda: False, lambda plan, _: dropped.append(plan), **options).run()
    return found, dropped


PLANS: list[AnyPlan] = [CpuPlan(8, tile_n) for tile_n in space.CPU_TILE_NS]


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0, 0.05), st.integers(0, 5))
def test_the_fastest_wins_in_spite_of_noise(seed: int, noise: float, best: int) -> None:
    found, dropped = race(FakeRig(by_columns(best), noise, seed), PLANS)
    winner, timing = next(iter(found.items()))
    assert winner == PLANS[best]
    assert timing.seconds == pytest.approx(1e-3, rel=noise + 1e-9)
    assert set(dropped) | set(found) == set(PLANS)
    assert len(dropped) >= 2


def test_losers_leave_early_and_equals_do_not() -> None:
    rig = FakeRig(lambda p: 1e-3 if p.tile_n < 64 else 2e-3)
    found, dropped = race(rig, PLANS)
    assert sorted(dropped) == sorted(PLANS[2:])
    assert [rig.timed.count(plan) for plan in dropped] == [1] * len(dropped)
    assert {timing.rounds for timing in found.values()} == {measure.MOST_ROUNDS}, "nobody leads: measured to the end"


def test_a_clear_lead_ends_the_race() -> None:
    found, _ = race(FakeRig(by_columns(0)), PLANS, keep=[PLANS[5]])
    assert list(found) == [PLANS[0], PLANS[5]]
    assert {timing.rounds for timing in found.values()} == {2 * measure.FIRST_ROUNDS}


def test_a_bad_start_is_forgiven() -> None:
    """Somebody used the machine in the first rounds of the best plan."""
    calls = itertools.count()
    rig = FakeRig(lambda p: 3e-3 if p == PLANS[0] and next(calls) < 4 else by_columns(0)(p), noise=0.001)
    found, _ = race(rig, PLANS)
    assert next(iter(found)) == PLANS[0]


def test_everybody_takes_turns() -> None:
    rig = FakeRig(lambda p: 1e-3)
    race(rig, PLANS)
    first = {rig.timed[i] for i in range(0, len(rig.timed), len(PLANS))}
    assert first == set(PLANS), "another one begins each burst"


def test_disturbed_rounds_do_not_count() -> None:
    rig = FakeRig(by_columns(2))
    rig.disturbed = itertools.cycle([True, True, False])
    rests: list[tuple[float, bool]] = []
    found, _ = race(rig, PLANS, rest=lambda seconds, disturbed: rests.append((seconds, disturbed)))
    assert next(iter(found)) == PLANS[2]
    assert [disturbed for _, disturbed in rests[:6]] == [True, True, False] * 2
    assert all(seconds >= 0 for seconds, _ in rests)
    rig.disturbed = itertools.repeat(True)
    assert race(rig, PLANS)[0] == {}, "it gives up"


def test_a_stopped_race_has_no_result() -> None:
    stopped = Race(FakeRig(by_columns(0)), PLANS, (), lambda: True, lambda *_: None)
    assert stopped.run() == {}


@given(st.lists(st.floats(1e-6, 1e-3), min_size=1, max_size=50))
def test_summaries(samples: list[float]) -> None:
    found = measure.summarise(samples)
    middle = sorted(samples)[len(samples) // 4 : len(samples) - len(samples) // 4]
    assert found.seconds == pytest.approx(np.mean(middle))
    assert (found.rounds, found.fastest) == (len(samples), min(samples))
    assert found.spread >= 0


def test_the_spread_is_the_standard_error() -> None:
    rng = np.random.default_rng(0)
    found = [measure.summarise(list(row)) for row in rng.normal(1.0, 0.01, (4000, 31))]
    claimed = np.mean([timing.spread for timing in found])
    assert claimed == pytest.approx(np.std([timing.seconds for timing in found]), rel=0.1)


def test_two_speeds_in_turns_repeat_as_well_as_one() -> None:
    """A median would fall on the one or the other. The spread does not know of the turns and claims more."""
    rng = np.random.default_rng(0)
    draws = rng.normal(np.resize((1.0, 1.03), 120), 0.005, (1000, 120))
    found = [measure.summarise(list(row)) for row in draws]
    times = np.array([timing.seconds for timing in found])
    assert np.mean(times) == pytest.approx(1.015, rel=1e-3)
    assert np.std(times) < 0.5 * np.std(np.median(draws, axis=1))
    assert np.std(times) < np.mean([timing.spread for timing in found]) < 0.003


# ---- the sweep ------------------------------------------------------------------------------------------------------


def measured() -> list[dict[str, Any]]:
    return store.rows("measurements", "ORDER BY id")


def test_a_sweep_publishes_the_best() -> None:
    outcome = sweep(FakeRig(by_columns(3)))
    assert outcome.winner is not None
    assert outcome.winner.plan == CpuPlan(8, 128)
    assert outcome.winner.default_plan == planner.default_plan(PROBLEM, CPU, 8)
    assert outcome.winner.default_seconds is not None
    assert outcome.winner.default_seconds > 1.1 * outcome.winner.seconds
    assert store.Mirror(store.path()).plan(PROBLEM, CPU, 8) == outcome.winner.plan
    (row,) = store.rows("winners")
    assert (row["compiler"], row["driver"], row["sources"], row["space"]) == ("c", "d", "s", "cpu 1")
    rows = measured()
    assert len(rows) == outcome.measured == len({row["plan"] for row in rows})
    assert {row["verdict"] for row in rows} == {"right"}
    assert sum(row["is_default"] for row in rows) == 1
    assert {row["clock_hz"] for row in rows} == {1.5e9}
    assert len({row["sweep"] for row in rows}) == 1


@pytest.mark.parametrize("error", [1.06, math.inf, math.nan, 5.0])
def test_a_wrong_plan_never_wins(error: float) -> None:
    rig = FakeRig(by_columns(3))
    rig.errors[CpuPlan(8, 128)] = error
    outcome = sweep(rig)
    assert outcome.winner is not None
    assert outcome.winner.plan in (CpuPlan(8, 64), CpuPlan(8, 192))
    assert CpuPlan(8, 128) not in rig.timed
    (row,) = [row for row in measured() if row["verdict"] == "wrong"]
    assert row["plan"] == store.plan_json(CpuPlan(8, 128))
    assert row["seconds"] is None
    assert row["error"] == (error if error < 10 else None)


def test_a_plan_that_cannot_be_built_or_run_is_recorded() -> None:
    rig = FakeRig(by_columns(3))
    rig.failing = {CpuPlan(8, 128)}
    target = FakeTarget(rig)
    target.unbuildable = {CpuPlan(8, 192): "registers spill"}
    with Writer() as writer:
        outcome = Sweep(target, writer, TASK, lambda: False, lambda _: None).run()
    assert outcome.winner is not None
    assert outcome.winner.plan == CpuPlan(8, 64)
    verdicts = {row["plan"]: row["verdict"] for row in measured() if row["verdict"] != "right"}
    assert verdicts == {
        store.plan_json(CpuPlan(8, 128)): "failed: too many resources requested",
        store.plan_json(CpuPlan(8, 192)): "registers spill",
    }


def test_nothing_right_publishes_nothing() -> None:
    rig = FakeRig(by_columns(3))
    rig.errors = dict.fromkeys([*PLANS, *space.kernels(TASK, CPU)], 2.0)
    outcome = sweep(rig)
    assert outcome.winner is None
    assert outcome.failed
    assert store.rows("winners") == []
    assert rig.closed


def test_a_winner_that_turns_wrong_is_not_published() -> None:
    """Each plan is checked before it is timed, the winner again afterwards."""
    rig = FakeRig(by_columns(3))
    seen: set[AnyPlan] = set()

    def error(plan: AnyPlan) -> float:
        again = plan in seen
        seen.add(plan)
        return 9.0 if again else 1.0

    rig.error = error  # type: ignore[method-assign]
    outcome = sweep(rig)
    assert outcome.winner is None
    assert "wrong now" in str(outcome.reason)
    assert store.rows("winners") == []


def test_a_stored_winner_is_replaced_only_by_a_clear_lead() -> None:
    assert sweep(FakeRig(by_columns(3))).winner is not None

    def nearly(p: AnyPlan) -> float:
        return 0.99999e-3 if p == CpuPlan(8, 64) else by_columns(3)(p)

    again = sweep(FakeRig(nearly, noise=0.02, seed=1))
    kept = again.winner
    assert kept is not None
    assert kept.plan == CpuPlan(8, 128)
    assert again.stored_seconds == kept.seconds
    assert again.best_seconds is not None
    assert again.best_seconds <= kept.seconds
    replaced = sweep(FakeRig(by_columns(1), noise=0.02)).winner
    assert replaced is not None
    assert replaced.plan == CpuPlan(8, 32)
    assert len({row["sweep"] for row in measured()}) == 3


@pytest.mark.parametrize(("lead", "noise", "shared"), [(1e-3, 0.02, True), (8e-3, 0.002, True), (0.013, 0.002, False)])
def test_one_kernel_serves_both_layouts_where_it_is_nearly_as_fast(lead: float, noise: float, shared: bool) -> None:
    """Another one would be loaded beside it, and its code be cold where calls take turns, for less than a percent."""
    sweep(FakeRig(by_columns(3)))

    def nearly(p: AnyPlan) -> float:
        return 1e-3 * (1 - lead) if p == CpuPlan(8, 64) else by_columns(3)(p)

    outcome = sweep(FakeRig(nearly, noise=noise, seed=1), TASK.with_other_scales())
    assert outcome.winner is not None
    assert outcome.winner.plan == CpuPlan(8, 128 if shared else 64)
    assert outcome.stored_seconds is None
    assert [row["row_scales"] for row in store.rows("winners")] == [0, 1]


def test_a_layouts_own_winner_comes_before_the_others() -> None:
    sweep(FakeRig(by_columns(3)))
    own = sweep(FakeRig(by_columns(1), noise=0.02), TASK.with_other_scales()).winner
    assert own is not None
    assert own.plan == CpuPlan(8, 32)
    tie = sweep(FakeRig(lambda p: 1e-3 * (1 + (p.tile_n not in (32, 128)))), TASK.with_other_scales()).winner
    assert tie is not None
    assert tie.plan == CpuPlan(8, 32)


def test_noise_is_no_lead() -> None:
    """What the spreads allow is a tie, however much longer the plan seems to take; the factor comes beside them."""
    first, loud, near, far = (CpuPlan(8, n) for n in (16, 32, 64, 128))
    standings: dict[AnyPlan, Timing] = {
        first: Timing(1.0, 0.001, 256, 0.9),
        near: Timing(1.009, 0.001, 256, 0.9),
        far: Timing(1.02, 0.001, 256, 0.9),
        loud: Timing(1.03, 0.03, 256, 0.9),
    }
    assert list(as_fast(standings)) == [first, loud]
    assert list(as_fast(standings, 1.01)) == [first, near, loud]


@pytest.mark.parametrize(
    ("m", "lead", "rows"), [(128, 1e-3, 64), (128, 0.017, 64), (128, 0.03, 128), (64, 0.017, 128), (256, 0.017, 128)]
)
def test_of_few_rows_a_small_lead_goes_to_ctas_that_copy_few_scales(m: int, lead: float, rows: int) -> None:
    task = Task(Problem(0, m, 7168, 2048), H100.name, H100.sms, H100.sms)
    deep = [p for p in space.kernels(task, H100)[1:] if isinstance(p, Plan) and p.depth > 1]
    plans = [p for p in deep if space.busy_sms(p, task) > 100]
    high, low = (next(p for p in plans if p.tile_m == tile_m) for tile_m in (128, 64))
    winner = sweep(FakeRig(two_ahead(high, lead, low), noise=0.03, seed=3), task, H100).winner
    assert winner is not None
    assert isinstance(winner.plan, Plan)
    assert winner.plan.tile_m == rows


def sliced_and_not(n: int, split: int) -> tuple[Task, list[Plan], Plan, Plan]:
    """A problem of 64 rows, its plans of that split, and of these two of the same tiles: in two slices, in one."""
    task = Task(Problem(0, 64, n, 7168), H100.name, H100.sms, H100.sms)
    plans = [plan for plan in space.kernels(task, H100) if isinstance(plan, Plan) and plan.split == split]
    two = next(plan for plan in plans if plan.slices == 2)
    like_two = {plan: plan._replace(stages=two.stages, depth=two.depth, slices=2) == two for plan in plans}
    return task, plans, two, next(plan for plan in plans if like_two[plan] and plan.slices == 1)


@pytest.mark.parametrize(
    ("n", "split", "lead", "slices"), [(576, 4, 1e-3, 2), (576, 4, 0.013, 2), (576, 4, 0.03, 1), (4096, 1, 0.01, 1)]
)
def test_a_small_lead_goes_to_two_slices_of_a_split_k(n: int, split: int, lead: float, slices: int) -> None:
    task, _, two, one = sliced_and_not(n, split)
    winner = sweep(FakeRig(two_ahead(one, lead, two), noise=0.02, seed=1), task, H100).winner
    assert winner is not None
    assert isinstance(winner.plan, Plan)
    assert winner.plan.slices == slices


def test_two_slices_are_in_the_final_behind_many_others() -> None:
    task, plans, two, one = sliced_and_not(2112, 2)
    others = {plan.kernel(0) for plan in plans if plan.slices == 1}
    assert len(others) > FINAL

    def seconds(p: AnyPlan) -> float:
        assert isinstance(p, Plan)
        kernel = p.kernel(0)
        if kernel == one.kernel(0):
            return 1e-5
        return 1e-5 * (1.012 if kernel == two.kernel(0) else 1.008 if kernel in others else 2)

    winner = sweep(FakeRig(seconds, noise=0.02, seed=1), task, H100).winner
    assert winner is not None
    assert isinstance(winner.plan, Plan)
    assert winner.plan.kernel(0) == two.kernel(0)


@pytest.mark.parametrize(("gain", "policy"), [(1e-3, "evict_normal"), (0.01, "evict_first"), (0.1, "evict_first")])
def test_a_tie_goes_to_the_usual_l2_policy(gain: float, policy: str) -> None:
    """A lead of a tenth of a percent is noise here, one of a percent is not, though both plans come to the end."""
    task = Task(Problem(0, 4096, 2112, 7168), H100.name, H100.sms, H100.sms)
    best = space.kernels(task, H100)[5]
    assert isinstance(best, Plan)

    def seconds(p: AnyPlan) -> float:
        assert isinstance(p, Plan)
        slower = p._replace(b_policy=best.b_policy) != best
        return 1e-4 * (1 + slower - gain * (p.b_policy == "evict_first"))

    outcome = sweep(FakeRig(seconds, noise=0.02, seed=2), task, H100)
    assert outcome.winner is not None
    assert outcome.winner.plan == best._replace(b_policy=policy)


@pytest.mark.parametrize("noise", [0.02, 0.002])
@pytest.mark.parametrize(("lead", "idle"), [(1e-3, False), (0.01, False), (0.03, True)])
def test_a_small_lead_goes_to_a_plan_that_leaves_few_sms_idle(lead: float, idle: bool, noise: float) -> None:
    task = Task(Problem(0, 64, 4096, 7168), H100.name, H100.sms, H100.sms)
    plans = [p for p in space.kernels(task, H100)[1:] if isinstance(p, Plan)]
    few = next(p for p in plans if space.busy_sms(p, task) < 90)
    many = next(p for p in plans if space.busy_sms(p, task) > 120)
    outcome = sweep(FakeRig(two_ahead(few, lead, many), noise=noise, seed=3), task, H100)
    assert outcome.winner is not None
    assert isinstance(outcome.winner.plan, Plan)
    assert outcome.winner.plan.kernel(0) == (few if idle else many).kernel(0)


def test_luck_does_not_decide() -> None:
    """A plan that was lucky in where its code lay, as one of many always is, loses the final, which loads it anew."""

    class Lucky(FakeRig):
        def times(self, plans: Sequence[AnyPlan], rounds: int) -> list[list[float]]:
            lucky = not self.renewed
            found = super().times(plans, rounds)
            return [
                [t * (0.965 if lucky and p == CpuPlan(8, 192) else 1) for t in ts]
                for p, ts in zip(plans, found, strict=True)
            ]

    def seconds(p: AnyPlan) -> float:
        assert isinstance(p, CpuPlan)
        return {128: 1.0, 192: 1.03}.get(p.tile_n, 2.0) * 1e-3 * (8 / p.threads)

    outcome = sweep(Lucky(seconds, noise=0.002))
    assert outcome.winner is not None
    assert outcome.winner.plan == CpuPlan(8, 128)


def test_the_final_is_of_all_stages() -> None:
    """A kernel that another one of its tile beat by luck does not go on, but comes to the final."""
    task = Task(Problem(0, 64, 4096, 7168), H100.name, H100.sms, H100.sms)
    plans = [p for p in space.kernels(task, H100)[1:] if isinstance(p, Plan) and space.busy_sms(p, task) > 120]
    best, lucky = next(
        (p, q)
        for p, q in itertools.combinations(plans, 2)
        if (p.tile_m, p.tile_n, p.slices) == (q.tile_m, q.tile_n, q.slices)
    )

    class Lucky(FakeRig):
        def times(self, plans: Sequence[AnyPlan], rounds: int) -> list[list[float]]:
            def gain(p: AnyPlan) -> float:
                return 0.99 if not self.renewed and isinstance(p, Plan) and p.kernel(0) == lucky.kernel(0) else 1.0

            found = super().times(plans, rounds)
            return [[t * gain(p) for t in ts] for p, ts in zip(plans, found, strict=True)]

    def seconds(p: AnyPlan) -> float:
        assert isinstance(p, Plan)
        return 1e-5 * {best.kernel(0): 1.0, lucky.kernel(0): 1.005}.get(p.kernel(0), 2.0)

    rig = Lucky(seconds, noise=0.004)
    outcome = sweep(rig, task, H100)
    assert outcome.winner is not None
    assert outcome.winner.plan == best
    rows = [row for row in store.rows("measurements") if row["seconds"] is not None]
    assert len({row["plan"] for row in rows}) == len(rows) == outcome.measured
    assert {row["plan"] for row in rows} == {store.plan_json(plan) for plan in rig.timed}


@pytest.mark.parametrize("bursts", [1, 7, 20])
def test_a_final_that_is_cut_short_does_not_count(bursts: int) -> None:
    """Stopped, and disturbed before: what the stages before found is published and recorded, each plan once."""
    calls: list[int] = []

    class Disturbed(FakeRig):
        def times(self, plans: Sequence[AnyPlan], rounds: int) -> list[list[float]]:
            calls.append(len(plans))
            found = super().times(plans, rounds)
            return [times if self.random.random() < 0.5 else [] for times in found] if final() else found

    doing = [""]

    def final() -> bool:
        return doing[0].startswith("final")

    def say(text: str) -> None:
        if text.startswith("final") and not final():
            calls.clear()
        doing[0] = text

    def stop() -> bool:
        return final() and len(calls) > bursts

    rig = Disturbed(lambda p: 1e-3 * (1 + 0.001 * space.CPU_TILE_NS.index(p.tile_n)), noise=0.002)
    with Writer() as writer:
        outcome = Sweep(FakeTarget(rig), writer, TASK, stop, say).run()
    assert final()
    assert len(calls) >= bursts
    assert outcome.winner is not None
    assert outcome.winner.default_seconds is not None
    rows = [row for row in store.rows("measurements") if row["seconds"] is not None]
    assert len({row["plan"] for row in rows}) == len(rows) == outcome.measured
    assert {row["plan"] for row in rows} == {store.plan_json(plan) for plan in rig.timed}
    assert min(row["rounds"] for row in rows) >= measure.LEAST_ROUNDS
    kept = {row["plan"]: row["rounds"] for row in rows}
    assert kept[store.plan_json(outcome.winner.plan)] == measure.MOST_ROUNDS


def test_a_final_of_long_calls_is_short() -> None:
    slow = FakeRig(lambda p: 1.0 + 0.001 * space.CPU_TILE_NS.index(p.tile_n), noise=0.01)
    assert sweep(slow).winner is not None
    rows = store.rows("measurements")
    assert max(row["rounds"] for row in rows) == measure.MOST_ROUNDS
    assert {row["plan"] for row in rows} == {store.plan_json(plan) for plan in slow.timed}, "some are lost"


def test_fewer_sms_at_little_cost_are_recorded() -> None:
    def seconds(p: AnyPlan) -> float:
        assert isinstance(p, CpuPlan)
        return by_columns(3)(p._replace(threads=8)) * (1.004 if p.num_sms in (6, 7) else 1 if p.num_sms == 8 else 1.5)

    outcome = sweep(FakeRig(seconds, noise=0.001))
    assert outcome.winner is not None
    assert (outcome.winner.plan, outcome.winner.frugal_plan) == (CpuPlan(8, 128), CpuPlan(6, 128))
    assert store.rows("winners")[0]["frugal_plan"] == store.plan_json(CpuPlan(6, 128))


def test_each_limit_has_its_own_winner() -> None:
    for task in presets.tasks([PROBLEM], CPU, [8, 3]):
        sweep(FakeRig(by_columns(3 if task.num_sms == 8 else 1)), task)
    mirror = store.Mirror(store.path())
    assert mirror.plan(PROBLEM, CPU, 8) == CpuPlan(8, 128)
    assert mirror.plan(PROBLEM, CPU, 3) == CpuPlan(3, 32)
    with pytest.raises(OperandError, match=r"num_sms.*9"):
        presets.tasks([PROBLEM], CPU, [9])


def test_a_sweep_of_a_gpu_plans_stages() -> None:
    """With made-up times: the best kernel, launch and number of SMs are found, one stage after another."""
    task = Task(Problem(0, 4096, 2112, 7168), H100.name, H100.sms, H100.sms)
    first = space.kernels(task, H100)
    best = first[min(7, len(first) - 1)]
    assert isinstance(best, Plan)
    wanted = best._replace(b_policy="evict_first", num_sms=132 - 16)

    def seconds(p: AnyPlan) -> float:
        assert isinstance(p, Plan)
        return 1e-4 * (2 - 0.3 * sum((p.kernel(0) == best.kernel(0), p.b_policy == wanted.b_policy, p.num_sms == 116)))

    outcome = sweep(FakeRig(seconds, noise=0.002), task, H100)
    assert outcome.winner is not None
    assert isinstance(outcome.winner.plan, Plan)
    assert outcome.winner.plan._replace(raster=best.raster) == wanted
    predictions = [row["predicted"] for row in measured()]
    assert all(p > 0 for p in predictions)


def test_a_sweep_that_is_stopped_keeps_what_it_finished() -> None:
    rig = FakeRig(by_columns(3))
    stop = itertools.count()
    with Writer() as writer:
        outcome = Sweep(FakeTarget(rig), writer, TASK, lambda: next(stop) > 10, lambda _: None).run()
    assert not outcome.failed or outcome.winner
    assert len(measured()) == outcome.measured


# ---- many problems --------------------------------------------------------------------------------------------------


def test_a_run_tells_its_progress_and_keeps_to_its_budget() -> None:
    target = FakeTarget(FakeRig(by_columns(3)))
    shown: list[tune.Progress] = []
    tasks = presets.tasks([PROBLEM._replace(m=m) for m in (16, 32, 48)], CPU)
    with Writer() as writer:
        outcomes = list(tune.run(target, writer, tasks, show=shown.append))
        assert [outcome.task for outcome in outcomes] == tasks
        assert {progress.done for progress in shown} == {0, 1, 2}
        assert shown[0].left is None
        assert shown[-1].left is not None
        assert any("best" in progress.doing for progress in shown)
        assert store.rows("leases") == []
        assert list(tune.run(target, writer, tasks, budget=0.0)) == []


def test_one_bad_problem_does_not_end_a_run() -> None:
    target = FakeTarget(FakeRig(by_columns(3)))
    original = target.rig

    def rig(task: Task) -> Rig:
        if task.problem.m == 16:
            raise BackendUnavailable("no room")
        return original(task)

    target.rig = rig  # type: ignore[method-assign]
    tasks = presets.tasks([PROBLEM._replace(m=m) for m in (16, 32)], CPU)
    with Writer() as writer:
        bad, good = tune.run(target, writer, tasks)
    assert (bad.reason, bad.failed, good.failed) == ("no room", True, False)


def test_a_device_that_is_lost_ends_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    target = FakeTarget(FakeRig(by_columns(3)))
    target.fake.errors = dict.fromkeys([*PLANS, *space.kernels(TASK, CPU)], 2.0)

    def lost() -> None:
        raise DriverError("an illegal address")

    monkeypatch.setattr(target, "check", lost)
    with Writer() as writer:
        run = tune.run(target, writer, [TASK, TASK])
        assert next(run).failed
        with pytest.raises(DriverError):
            next(run)
    assert store.rows("leases") == []


def test_presets() -> None:
    for name in presets.presets():
        problems = presets.preset(name)
        assert 4 <= len(problems) <= 100
        for problem in problems:
            assert problem.k % 128 == 0
            assert problem.m == planner.bucket(problem.m)
    weights = {(p.n, p.k) for p in presets.preset("deepseek-v3")}
    assert weights == set(WEIGHTS)
    assert len(presets.preset("deepseek-v3", [1, 5, 8])) == 7
    with pytest.raises(OperandError, match="there are deepseek-v3"):
        presets.preset("gpt-2")


# ---- the CPU rig ----------------------------------------------------------------------------------------------------

each_problem = pytest.mark.parametrize(
    "problem",
    [
        Problem(native.DENSE, 48, 272, 400),
        Problem(native.CONTIGUOUS, 512, 144, 256, 3),
        Problem(native.RAGGED, 112, 144, 256, 5),
        Problem(native.MASKED, 64, 144, 256, 4, 32),
    ],
    ids=lambda p: p.kind,
)


@each_problem
def test_the_rig_accepts_right_plans_and_times_them(problem: Problem) -> None:
    rig = cpu.CpuRig(Task(problem, "", 2, 2))
    plans = [CpuPlan(1, 32), CpuPlan(2, 256)]
    assert [rig.error(plan) for plan in plans] == pytest.approx([1.0, 1.0], abs=0.01)
    times = rig.times(plans, 2)
    assert [len(samples) for samples in times] == [2, 2]
    assert all(0 < x < 10 for samples in times for x in samples)


@each_problem
@pytest.mark.parametrize("fault", ["none", "half", "element", "stray"])
def test_the_rig_sees_wrong_outputs(problem: Problem, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = cpu.CpuRig(Task(problem, "", 2, 2))
    original = rig._run

    def run(plan: AnyPlan) -> None:
        if fault != "none":
            original(plan)
        rows, owned = rig.d.reshape(-1, problem.n), rig._owned.reshape(-1)
        if fault == "half":
            rows[owned] &= 0xFFF0
        elif fault == "element":
            rows[np.flatnonzero(owned)[-1], 3] = 0x7FDE
        elif fault == "stray" and not owned.all():
            rows[np.flatnonzero(~owned)[0], 0] = 0

    monkeypatch.setattr(rig, "_run", run)
    wrong = not rig.error(CpuPlan(1, 32)) <= 1.05
    assert wrong == (fault != "stray" or not rig._owned.all())


@given(
    st.integers(0, 3),
    st.integers(1, 40).map(lambda i: 16 * i),
    st.integers(1, 9),
    st.integers(0, 40).map(lambda i: 16 * i),
)
def test_groups_are_shared_out(kind: int, m: int, groups: int, expected: int) -> None:
    problem = Problem(kind, m, 64, 64, groups if kind else 1, min(expected, m))
    parts, layout = operands.pieces(problem), operands.layout(problem)
    if kind == native.DENSE:
        assert layout == []
    elif kind == native.MASKED:
        assert len(layout) == groups
        assert all(0 <= rows <= m for rows in layout)
        assert sum(layout) <= (expected or m) * groups + groups
    elif kind == native.RAGGED:
        assert layout == sorted(layout)
        assert (len(layout), layout[-1]) == (groups, m)
    else:
        assert len(layout) == m
        for row in range(1, m):
            assert layout[row] in (layout[row - 1], -1) or row % 128 == 0
    assert sum(part.rows for part in parts) <= m * (groups if kind == native.MASKED else 1)


def test_a_tune_on_this_cpu_for_real() -> None:
    target = open_target("cpu")
    problem = presets.problem(native.DENSE, 20, 256, 512)
    (task,) = presets.tasks([problem], target.device)
    with Writer() as writer:
        (outcome,) = tune.run(target, writer, [task])
    assert outcome.winner is not None
    assert outcome.winner.plan.num_sms <= backends.cpu_threads()
    found = native.Problem(native.DENSE, native.CPU, 0, 20, 256, 512, 1, 1, 1, 1)
    assert planner.choose(planner.make_key(found)) == (outcome.winner.plan, True)


# ---- the judgement of a GPU's outputs -------------------------------------------------------------------------------


def test_the_judgement_of_outputs() -> None:
    good = np.array([[1.0, 1.0, 0], [4.0, 4.0, 0], [0.0, 0.0, 0]])
    assert judge(good, 512) == 1.0
    for row, column, value in ((0, 2, 1.0), (0, 0, math.nan), (0, 0, math.inf), (2, 0, 1e-9), (0, 0, 4.1)):
        bad = good.copy()
        bad[row, column] = value
        assert judge(bad, 512) == math.inf
    assert judge(np.array([[4.4, 4.0, 0]]), 512) == pytest.approx(math.sqrt(1.1))
    assert judge(np.zeros((4, 3)), 512) == 1.0
    assert judge(np.array([[1e-9, 0.0, 0]]), 512) == math.inf
    lucky = np.array([[0.1, 0.0, 0], [100.0, 100.0, 0]])
    assert judge(lucky, 512) == math.inf
    assert judge(lucky, 8) == pytest.approx(math.sqrt(1.001))
