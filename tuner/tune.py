"""Tunes many problems, one after another, within a budget."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fp8gemm.store import Task

from . import space
from .measure import Stop
from .sweep import Outcome, Sweep
from .target import Target
from .writer import Writer


class Progress(NamedTuple):
    """Where a run stands: which of how many problems, what it is doing, seconds that the rest should take."""

    done: int
    total: int
    task: Task
    doing: str
    left: float | None


def run(
    target: Target,
    writer: Writer,
    tasks: Sequence[Task],
    *,
    budget: float | None = None,
    stop: Stop = lambda: False,
    show: Callable[[Progress], None] = lambda _: None,
    full: bool = False,
) -> Iterator[Outcome]:
    """The outcome of each problem as soon as it is there. A problem that cannot be tuned has the reason in it.

    Raises StoreError if the store cannot be written, DriverError if the device cannot be used any more.
    `budget`: seconds for all; what has been measured when they are over is published where it is enough to judge by.
    """
    started = time.monotonic()

    def over() -> bool:
        return stop() or (budget is not None and time.monotonic() - started > budget)

    target.announce([(plan, task) for task in tasks for plan in space.kernels(task, target.device)])
    for index, task in enumerate(tasks):
        if over():
            return

        def say(doing: str, index: int = index, task: Task = task) -> None:
            spent = time.monotonic() - started
            left = spent / index * (len(tasks) - index) if index else None
            if budget is not None:
                left = min(budget - spent, budget if left is None else left)
            show(Progress(index, len(tasks), task, doing, left))

        say("enumerating plans")
        writer.renew(task)  # so that no daemon measures it too
        try:
            outcome = Sweep(target, writer, task, over, say, full=full).run()
        finally:
            writer.release(task)
        yield outcome
        if outcome.failed:
            target.check()
