"""Finds the best plan of one problem: enumerate, build, check, measure, publish."""

import contextlib
import secrets
from collections.abc import Iterable
from typing import NamedTuple

from fp8gemm import store
from fp8gemm.accuracy import TOLERANCE
from fp8gemm.errors import Fp8GemmError, StoreError
from fp8gemm.plan import Plan
from fp8gemm.store import AnyPlan, Task

from . import space
from .measure import FINAL_ROUNDS, MOST_ROUNDS, Race, Rest, Rig, Stop, Timing
from .target import Say, Target
from .writer import Measurement, Winner, Writer

RIGHT, WRONG = "right", "wrong"
STOPPED = "stopped before it was finished"
NEARLY = 1.01  # times the best: a plan that is better otherwise may take this much longer
FEWER_SCALES = 1.02  # so may one that copies or reads fewer scales: sweeps hardly see what these cost
FULL = 0.7  # of the SMs are busy with most plans: in a graph CTAs come where SMs fall free, and few spread badly
LEAD = 1.015  # so a plan for fewer wins only if all others take this many times as long
FINALISTS = 6  # of one stage, each of another tile, lend their plans to the next
FINAL = 12  # plans of all stages race once more, and the best of the finalists' tiles
FINAL_SECONDS = 1.5  # of running plans at most, unless fewer rounds than any race's would fit


class Outcome(NamedTuple):
    """What a sweep came to: a winner, or the reason why there is none.

    `best_seconds` is less than the winner's time where a plan that is nearly as fast was preferred; `stored_seconds`
    is the time, in the same rounds, of the winner that was stored before.
    """

    task: Task
    winner: Winner | None
    measured: int  # plans that were timed
    reason: str | None = None
    best_seconds: float | None = None
    stored_seconds: float | None = None

    @property
    def failed(self) -> bool:
        """Whether trying again would not help."""
        return self.reason is not None and self.reason != STOPPED


class Sweep:
    """One problem on one target. A plan's time is in the store as soon as the plan has left its last race."""

    def __init__(
        self,
        target: Target,
        writer: Writer,
        task: Task,
        stop: Stop,
        say: Say,
        *,
        full: bool = False,
        rest: Rest | None = None,
    ) -> None:
        """`full`: try all kernels but the hopeless, to see what ranking by the model loses. `rest`: see `Race`."""
        self.target, self.writer, self.task, self.stop = target, writer, task, stop
        self.say, self.full, self.rest = say, full, rest
        self.id = secrets.token_hex(8)
        self.space = store.space(target.device)
        self.default = space.default(task, target.device)
        self.stored = writer.incumbent(task, target.device)
        self.other = writer.incumbent(task.with_other_scales(), target.device)  # of the other layout of A's scales
        self.known = [plan for plan in (self.stored, self.other, self.default) if plan]  # calls use the first so far
        self.errors: dict[AnyPlan, float] = {}
        self.stages: list[dict[AnyPlan, Timing]] = []  # the survivors of each
        self.recorded: set[AnyPlan] = set()

    def run(self) -> Outcome:
        """A problem that cannot be tuned is an outcome too. Raises StoreError."""
        try:
            return self._run()
        except StoreError:
            raise
        except Fp8GemmError as error:
            return self._nothing(str(error).splitlines()[0])

    def _run(self) -> Outcome:
        plans = space.kernels(self.task, self.target.device, None if self.full else space.MOST)
        plans = self._built(dict.fromkeys([*plans, *self.known]))
        if not plans:
            return self._nothing(STOPPED if self.stop() else "no plan could be built")
        with contextlib.closing(self.target.rig(self.task)) as rig:
            return self._race(rig, plans)

    def _nothing(self, reason: str) -> Outcome:
        return Outcome(self.task, None, len(self.recorded), reason)

    def _race(self, rig: Rig, plans: list[AnyPlan]) -> Outcome:
        standings = self._stage(rig, plans, "kernels")
        for stage, more in (("rasters", space.rasters), ("fewer SMs", space.fewer_sms)):
            if not standings or self.stop():
                break
            finalists = space.of_different_tiles(standings, FINALISTS)
            extra = [plan for best in finalists for plan in more(best, self.task)]
            if extra:
                keep = dict.fromkeys([*finalists, *map(usual, finalists), *self.known])
                going_on = [plan for plan in keep if plan in standings]
                later = self._stage(rig, [*going_on, *self._built(extra)], stage)
                standings = later or standings
        standings = self._final(rig, standings)
        self._record(rig, self._survivors() | standings)
        if not standings:
            return self._nothing(STOPPED if self.stop() else "no right plan, or no undisturbed round")
        winner = self._winner(standings)
        if not rig.error(winner.plan) <= TOLERANCE:  # once more, after all that ran since
            return self._nothing(f"{winner.plan} was right at first and is wrong now")
        self.writer.publish(self.task, self.space, winner, self.target.stamp)
        stored = standings.get(self.stored) if self.stored else None
        best = next(iter(standings.values())).seconds
        return Outcome(self.task, winner, len(self.recorded), None, best, stored.seconds if stored else None)

    def _final(self, rig: Rig, standings: dict[AnyPlan, Timing]) -> dict[AnyPlan, Timing]:
        """The best of all stages once more, samples and code all new: who leads among many that are nearly alike was
        lucky, too, and so was who went on.

        If it is cut short, the times of before count.
        """
        if len(standings) < 2 or self.stop():
            return standings
        known, places = self._survivors(), self._places()
        best = sorted(known, key=places.__getitem__)
        full = next((plan for plan in best if self._leaves_few_idle(plan)), best[0])
        lighter = [
            next((plan for plan in best if is_lighter(plan, lead, self.task)), None)
            for lead in (best[0], full)
            for is_lighter in space.lighter(self.task)
        ]
        stay = [*self.known, full, *lighter, self._frugal(standings, next(iter(standings)))]
        first = [*best[:FINAL], *space.of_different_tiles(best, FINALISTS)]
        plans = [plan for plan in dict.fromkeys([*first, *map(usual, first), *stay]) if plan in known]
        self._record(rig, {plan: timing for plan, timing in known.items() if plan not in plans})
        longest = FINAL_SECONDS / sum(known[plan].seconds for plan in plans)
        rounds = min(FINAL_ROUNDS, max(MOST_ROUNDS, int(longest)))
        rig.renew(plans)
        race = self._new_race(rig, plans, "final", stay, rounds)
        found = race.run()
        return found if race.finished else standings

    def _built(self, plans: Iterable[AnyPlan]) -> list[AnyPlan]:
        """Those that compile, without spills; the others are recorded."""
        wanted = [plan for plan in plans if not any(plan.violations(self.task.problem.kind, self.target.device))]
        failed = self.target.build(wanted, self.task, self.stop, self.say)
        self.writer.measured(self.task, self.space, self.id, [self._failure(p, why) for p, why in failed.items()])
        return [plan for plan in wanted if plan not in failed]

    def _stage(self, rig: Rig, plans: list[AnyPlan], stage: str) -> dict[AnyPlan, Timing]:
        """A race of those that are right; nothing if it is stopped before any time counts."""
        right = self._right(rig, plans)
        if not right or self.stop():
            return {}
        self.stages.append(self._new_race(rig, right, stage, self.known, MOST_ROUNDS).run())
        return self.stages[-1]

    def _survivors(self) -> dict[AnyPlan, Timing]:
        """The plans that no race dropped, whether the next stage took them on or not, by their last stage."""
        return {p: timing for stage in self.stages for p, timing in stage.items() if p not in self.recorded}

    def _places(self) -> dict[AnyPlan, float]:
        """What compares times of different stages: seconds over the default's, which runs in all."""
        places: dict[AnyPlan, float] = {}
        for stage in self.stages:
            default = stage.get(self.default)
            places |= {plan: t.seconds / (default.seconds if default else 1.0) for plan, t in stage.items()}
        return places

    def _new_race(
        self, rig: Rig, plans: list[AnyPlan], stage: str, keep: Iterable[AnyPlan | None], rounds: int
    ) -> Race:
        def dropped(plan: AnyPlan, timing: Timing) -> None:
            self._record(rig, {plan: timing})

        def told(race: Race) -> None:
            standings = race.standings()
            if standings:
                best, default = next(iter(standings.values())), standings.get(self.default)
                beside = f" (default {1e6 * default.seconds:.1f})" if default else ""
                left = f"{len(standings)} of {len(plans)} plans"
                self.say(f"{stage}: {left}, best {1e6 * best.seconds:.1f} us{beside}")

        return Race(rig, plans, filter(None, keep), self.stop, dropped, told, self.rest, rounds)

    def _right(self, rig: Rig, plans: Iterable[AnyPlan]) -> list[AnyPlan]:
        """Those whose output is right; the others are recorded."""
        found, wrong = [], []
        for plan in dict.fromkeys(plans):
            if self.stop():
                return []
            if plan not in self.errors:
                self.say(f"checking {plan}")
                try:
                    self.errors[plan] = rig.error(plan)
                except Fp8GemmError as error:
                    wrong.append(self._failure(plan, f"failed: {error}".splitlines()[0]))
                    continue
                if not self.errors[plan] <= TOLERANCE:
                    wrong.append(self._failure(plan, WRONG))
            if self.errors[plan] <= TOLERANCE:
                found.append(plan)
        if wrong:
            self.writer.measured(self.task, self.space, self.id, wrong)
        return found

    def _failure(self, plan: AnyPlan, verdict: str) -> Measurement:
        guess = space.predicted(plan, self.task, self.target.device)
        error = self.errors.get(plan)
        finite = error if error is not None and error < 1e30 else None
        return Measurement(plan, plan == self.default, guess, None, None, None, 0, finite, verdict)

    def _record(self, rig: Rig, timings: dict[AnyPlan, Timing]) -> None:
        guess = {plan: space.predicted(plan, self.task, self.target.device) for plan in timings}
        clock = rig.clock_hz()
        self.writer.measured(
            self.task,
            self.space,
            self.id,
            [
                Measurement(plan, plan == self.default, guess[plan], *t[:2], clock, t[2], self.errors[plan], RIGHT)
                for plan, t in timings.items()
                if plan not in self.recorded
            ],
        )
        self.recorded |= timings.keys()

    def _winner(self, standings: dict[AnyPlan, Timing]) -> Winner:
        """The preferred plan, and beside it the one with the fewest SMs that takes hardly longer."""
        best = self._preferred(standings)
        timing, default = standings[best], standings.get(self.default)
        winner = Winner(best, timing.seconds, timing.spread, self.default, default.seconds if default else None)
        frugal = self._frugal(standings, best)
        if not frugal:
            return winner
        return winner._replace(frugal_plan=frugal, frugal_seconds=standings[frugal].seconds)

    def _preferred(self, standings: dict[AnyPlan, Timing]) -> AnyPlan:
        """The fastest that leaves few SMs idle, if one does that is hardly slower than all others. Instead of it

        - within the noise the stored winner;
        - if nearly as fast, the other layout's winner: one kernel serves both;
        - if nearly as fast, one whose CTAs copy scales of fewer rows, and of its tiles one whose consumers read fewer;
          within the noise the default, or one with the usual policy.
        """
        full = {plan: t for plan, t in standings.items() if self._leaves_few_idle(plan)}
        if not full.keys() & as_fast(standings, LEAD).keys():
            full = standings
        if self.stored in as_fast(full):
            return self.stored
        if self.other in as_fast(full, NEARLY):
            return self.other
        for is_lighter in space.lighter(self.task):
            best, nearly = next(iter(full)), as_fast(full, FEWER_SCALES)
            full = {plan: t for plan, t in nearly.items() if is_lighter(plan, best, self.task)} or full
        best, tied = next(iter(full)), as_fast(full)
        return next(plan for plan in (self.default, usual(best), best) if plan in tied)

    def _leaves_few_idle(self, plan: AnyPlan) -> bool:
        """Whether the plan has tiles for most SMs of a GPU."""
        return not isinstance(plan, Plan) or space.busy_sms(plan, self.task) >= FULL * self.task.num_sms

    @staticmethod
    def _frugal(standings: dict[AnyPlan, Timing], best: AnyPlan) -> AnyPlan | None:
        """The plan with the fewest SMs, fewer than the best one's, that takes hardly longer."""
        limit = NEARLY * standings[best].seconds
        thrifty = [plan for plan, t in standings.items() if plan.num_sms < best.num_sms and t.seconds <= limit]
        return min(thrifty, key=lambda plan: (plan.num_sms, standings[plan].seconds), default=None)


def as_fast(standings: dict[AnyPlan, Timing], factor: float = 1.0) -> dict[AnyPlan, Timing]:
    """Those that take at most `factor` times as long as the first, or are as fast within the noise."""
    best = next(iter(standings.values()))
    return {
        p: t
        for p, t in standings.items()
        if t.seconds <= max(factor * best.seconds, best.seconds + best.spread + t.spread)
    }


def usual(plan: AnyPlan) -> AnyPlan:
    """The plan with the usual L2 policy. In comparisons another one that had led by luck was up to 0.5% behind it."""
    return plan._replace(b_policy=space.POLICIES[0]) if isinstance(plan, Plan) else plan
