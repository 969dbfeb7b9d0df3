"""Times plans against each other: in turns, losers leave early, until the lead exceeds the noise.

What is timed is a `Rig`: one problem's operands on one device. Nothing here knows which.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from fp8gemm.store import AnyPlan

FIRST_ROUNDS = 5  # before anyone is judged, and between judgements
MOST_ROUNDS = 30
FINAL_ROUNDS = 256  # a time of 10 us is known to 1% after 30 rounds, and 1% is what the best plans differ by
LEAST_ROUNDS = FIRST_ROUNDS  # for a time that counts
PATIENCE = 20  # bursts without one undisturbed round, after which a race is given up

Stop = Callable[[], bool]  # whether the sweep has to end now
Rest = Callable[[float, bool], None]  # hears a burst's seconds and whether somebody disturbed it, and may sleep


class Rig(Protocol):
    """One problem on one device. Every output is checked against a reference that shares no code with the plans."""

    def error(self, plan: AnyPlan) -> float:
        """Runs the plan on a poisoned output: its error over that of rounding to bf16; infinite or NaN if it is wrong.

        Raises Fp8GemmError if the plan cannot be run at all.
        """

    def times(self, plans: Sequence[AnyPlan], rounds: int) -> list[list[float]]:
        """Seconds of each plan in `rounds` rounds in which they take turns; rounds that were disturbed are left out."""

    def renew(self, plans: Sequence[AnyPlan]) -> None:
        """From here on these run from other places in memory, where the device has code that can be loaded again."""

    def clock_hz(self) -> float | None:
        """The SMs' clock now; None where nobody tells."""

    def close(self) -> None:
        """Frees the operands."""


class Timing(NamedTuple):
    """Mean of the middle half of a plan's rounds, in seconds, that mean's standard error, and the fastest round."""

    seconds: float
    spread: float
    rounds: int
    fastest: float


def summarise(samples: Sequence[float]) -> Timing:
    """A mean, because rounds may come at a few speeds, one for each load of a kernel: a median falls on one of them.

    Its error: Tukey and McLaughlin, Less vulnerable confidence and significance procedures for location, 1963.
    """
    ordered, count = sorted(samples), len(samples)
    cut = count // 4
    middle = ordered[cut : count - cut]
    winsorised = [middle[0]] * cut + middle + [middle[-1]] * cut
    error = statistics.pstdev(winsorised) / len(middle) * math.sqrt(count)
    return Timing(statistics.fmean(middle), error, count, ordered[0])


def clearly_slower(one: Timing, than: Timing) -> bool:
    """Whether a plan may leave the race. The fewer rounds, the larger the lead must be: early noise is no estimate.

    Nor is one round that went well enough: others on the machine may have spoilt the rest.
    """
    lead = one.seconds - than.seconds
    return (
        one.fastest > than.seconds and lead > 3 * (one.spread + than.spread) and lead > 0.45 / one.rounds * than.seconds
    )


class Race:
    """The timings of several plans. `dropped` hears of each loser as it leaves."""

    def __init__(
        self,
        rig: Rig,
        plans: Iterable[AnyPlan],
        keep: Iterable[AnyPlan],
        stop: Stop,
        dropped: Callable[[AnyPlan, Timing], None],
        told: Callable[["Race"], None] = lambda _: None,
        rest: Rest | None = None,
        most_rounds: int = MOST_ROUNDS,
    ) -> None:
        """`keep`: plans that stay to the end, so that their times are of the same rounds as the winner's. `told` hears
        of each burst; with `rest`, bursts are short, and it is called after each."""
        self.rig, self.stop, self.dropped, self.told, self.rest = rig, stop, dropped, told, rest
        self.most_rounds = most_rounds
        self.alive = list(dict.fromkeys(plans))
        self.keep = set(keep)
        self.samples: dict[AnyPlan, list[float]] = {plan: [] for plan in self.alive}
        self.finished = False  # decided, or as many rounds as there may be
        self._judged = 0  # rounds at the last judgement

    def run(self) -> dict[AnyPlan, Timing]:
        """The survivors, fastest first; empty if it was stopped, or disturbed, before any time counts."""
        fruitless = 0
        while not self.stop() and fruitless < PATIENCE:
            started = time.perf_counter()
            order = self.alive[1:] + self.alive[:1]  # another one begins each time
            self.alive = order
            found = self.rig.times(order, 1 if self.rest else FIRST_ROUNDS)
            for plan, times in zip(order, found, strict=True):
                self.samples[plan] += times
            fruitless = 0 if any(found) else fruitless + 1
            self.told(self)
            if self.rest:
                self.rest(time.perf_counter() - started, not all(found))
            least = min(len(self.samples[plan]) for plan in self.alive)
            if least >= self._judged + FIRST_ROUNDS:
                self._judged = least
                if self._judge(least):
                    self.finished = True
                    break
        return {plan: t for plan, t in self.standings().items() if t.rounds >= LEAST_ROUNDS}

    def standings(self) -> dict[AnyPlan, Timing]:
        """Who is left and was timed, fastest first."""
        timings = {plan: summarise(self.samples[plan]) for plan in self.alive if self.samples[plan]}
        return dict(sorted(timings.items(), key=lambda item: item[1].seconds))

    def _judge(self, rounds: int) -> bool:
        """Drops losers. Whether the race is over."""
        timings = self.standings()
        leader, best = next(iter(timings.items()))
        for plan, timing in timings.items():
            if plan not in self.keep and plan != leader and clearly_slower(timing, best):
                self.alive.remove(plan)
                self.dropped(plan, timing)
        others = [timings[plan] for plan in self.alive if plan != leader]
        decided = all(clearly_slower(timing, best) for timing in others)
        return rounds >= self.most_rounds or (decided and rounds >= 2 * FIRST_ROUNDS)
