"""How the tuner's commands show what they do and found."""

import contextlib
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

from . import store
from .render import COLOURS, console, counted, duration, json_ready
from .tuner.report import no_plans, plan_text
from .tuner.sweep import Outcome
from .tuner.target import Target
from .tuner.tune import Progress
from .tuner.warmup import Warmed

# ---- while it runs --------------------------------------------------------------------------------------------------


class Lines:
    """Progress for files and pipes: a line as a problem begins and one as it ends."""

    def __init__(self) -> None:
        self._task: object = None

    def __call__(self, progress: Progress) -> None:
        if progress.task != self._task:
            self._task = progress.task
            self.print(f"[{progress.done + 1}/{progress.total}] {_left(progress.left)}{progress.task.name}")

    def finished(self, outcome: Outcome) -> None:
        self.print(f"    {outcome_line(outcome)}")

    def print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class Bar(Lines):
    """Progress on a terminal: what is done now, in place; what is finished stays above."""

    def __init__(self, bars: Bars) -> None:
        super().__init__()
        self._bars, self._id = bars, bars.add_task("", total=None)

    def __call__(self, progress: Progress) -> None:
        text = f"{_left(progress.left)}{progress.task.name}: {progress.doing}"
        self._bars.update(self._id, description=text, completed=progress.done, total=progress.total)

    def finished(self, outcome: Outcome) -> None:
        self._bars.advance(self._id)
        super().finished(outcome)

    def print(self, line: str) -> None:
        self._bars.console.print(line.strip())


@contextlib.contextmanager
def live(quiet: bool) -> Iterator[Lines]:
    """Shows a run on stderr; `quiet`: line by line, as for programs."""
    err = Console(stderr=True, highlight=False)
    if quiet or not err.is_terminal:
        yield Lines()
        return
    text = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
    with Bars(BarColumn(10), MofNCompleteColumn(), text, console=err, transient=True, expand=True) as bars:
        yield Bar(bars)


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f"about {duration(max(seconds, 0.0))} to go, "


def outcome_line(outcome: Outcome) -> str:
    winner = outcome.winner
    if winner is None:
        return f"{outcome.task.name}: no winner: {outcome.reason}"
    beside = f", default {duration(winner.default_seconds)}" if winner.default_seconds else ""
    return f"{outcome.task.name}: {winner.plan}, {duration(winner.seconds)}{beside}"


# ---- what it found --------------------------------------------------------------------------------------------------


def outcomes_json(target: Target, outcomes: Sequence[Outcome], asked: int) -> dict[str, Any]:
    """Every winner, in seconds."""
    return json_ready(  # type: ignore[no-any-return]
        {
            "store": str(store.path()),
            "device": target.name,
            "hardware": target.device.name,
            "asked": asked,
            "behind_the_best": behind(outcomes),
            "problems": [_outcome_json(outcome) for outcome in outcomes],
        }
    )


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    found = row_json(outcome.task.row())
    found |= {name: getattr(outcome, name) for name in ("measured", "reason", "best_seconds", "stored_seconds")}
    if outcome.winner:
        plans = {k: v._asdict() for k, v in outcome.winner._asdict().items() if k.endswith("plan") and v}
        found |= outcome.winner._asdict() | plans
    return found


def row_json(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the store: plans as objects, and what is true or false as such."""
    plans = {k: json.loads(v) for k, v in row.items() if k.endswith("plan") and v}
    return row | plans | {k: bool(row[k]) for k in ("row_scales", "is_default") if k in row}


def behind(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """How much slower than the best plan of each sweep default and stored plans are: geometric mean and worst."""
    found = {}
    best = [(outcome, outcome.winner, outcome.best_seconds) for outcome in outcomes]
    times = {
        "default": [(winner.default_seconds, least) for _, winner, least in best if winner],
        "stored": [(outcome.stored_seconds, least) for outcome, _, least in best],
    }
    for name, pairs in times.items():
        ratios = [seconds / least for seconds, least in pairs if seconds and least]
        if ratios:
            mean = statistics.geometric_mean(ratios)
            found[name] = {"problems": len(ratios), "geometric_mean": mean, "worst": max(ratios)}
    return found


def _table(title: str, about: str) -> Table:
    heading = Text.assemble((title, "bold"), f"  {about}")
    return Table(title=heading, title_justify="left", title_style="", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def show_outcomes(target: Target, outcomes: Sequence[Outcome], asked: int) -> None:
    """Default and tuned, side by side."""
    if not asked:
        console().print("nothing to tune")
        return
    table = _table(f"Tuned on {target.name}", target.device.name)
    table.add_column("problem", no_wrap=True)
    table.add_column("default plan")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("tuned plan")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("gain", justify="right", no_wrap=True)
    table.add_column("plans", justify="right")
    for outcome in outcomes:
        winner = outcome.winner
        if winner is None:
            table.add_row(outcome.task.name, Text(str(outcome.reason), COLOURS[1]))
            continue
        default = duration(winner.default_seconds) if winner.default_seconds else "-"
        gain = _gain(winner.default_seconds, winner.seconds)
        plan = "the default" if winner.plan == winner.default_plan else str(winner.plan)
        cells = str(winner.default_plan), default, plan, duration(winner.seconds), gain, str(outcome.measured)
        table.add_row(outcome.task.name, *cells)
    out = console()
    out.print(table)
    if len(outcomes) < asked:
        left = counted(asked - len(outcomes), "problem")
        _note(out, f"{left} of {asked} not reached: the time was over", "yellow")
    for name, figures in behind(outcomes).items():
        mean, worst = figures["geometric_mean"] - 1, figures["worst"] - 1
        slower = f"{mean:.1%} slower than the best of these sweeps in the geometric mean, {worst:.1%} at worst"
        _note(out, f"{name} plans are {slower}")
    if any(outcome.winner for outcome in outcomes):
        text = "kept in {}; running processes take those that give the same bits within a second"
        _note(out, text.format(store.path()), "dim")


def _note(out: Console, text: str, style: str = "") -> None:
    """Below a table, in line with it."""
    out.print(Padding(Text(text, style), (0, 0, 0, 2)))


def _gain(default: float | None, seconds: float) -> Text:
    if not default:
        return Text("-")
    return Text(f"{default / seconds - 1:+.1%}", "green" if default > 1.005 * seconds else "dim")


def show_winners(rows: Sequence[dict[str, Any]]) -> None:
    """`plans list`."""
    if not rows:
        console().print(no_plans(str(store.path())))
        return
    devices = {row["device"] for row in rows}  # one alone is told above the table
    table = _table(counted(len(rows), "plan"), " ".join([*(devices if len(devices) == 1 else ()), str(store.path())]))
    if len(devices) > 1:
        table.add_column("device")
    table.add_column("problem", no_wrap=True)
    table.add_column("plan")
    for name in ("time", "default", "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    thrifty = any(row["frugal_plan"] for row in rows)
    if thrifty:
        table.add_column("fewer SMs")
    table.add_column("tuned", no_wrap=True)
    for row in rows:
        default = row["default_seconds"]
        frugal = f"{plan_text(row['frugal_plan'])}: {duration(row['frugal_seconds'])}" if row["frugal_plan"] else ""
        table.add_row(
            *([row["device"]] if len(devices) > 1 else []),
            store.Task.from_row(row).name,
            plan_text(row["plan"]),
            duration(row["seconds"]),
            duration(default) if default else "-",
            _gain(default, row["seconds"]),
            *([frugal] if thrifty else []),
            row["tuned"],
        )
    console().print(table)


def show_measurements(rows: Sequence[dict[str, Any]]) -> None:
    """`plans show`."""
    if not rows:
        console().print("no measurements of this problem")
        return
    table = _table(counted(len(rows), "measurement"), str(store.path()))
    ended = {row["sweep"]: row["date"] for row in sorted(rows, key=lambda row: row["date"])}
    for name in ("end of sweep", "problem", "plan"):
        table.add_column(name, no_wrap=name == "problem")
    for name in ("time", "spread", "rounds", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in rows:
        timed = row["seconds"] is not None
        verdict = row["verdict"] + (", the default" if row["is_default"] else "")
        table.add_row(
            ended[row["sweep"]],
            store.Task.from_row(row).name,
            plan_text(row["plan"]),
            duration(row["seconds"]) if timed else "-",
            f"{row['spread'] / row['seconds']:.1%}" if timed else "-",
            str(row["rounds"]),
            f"{row['error']:.3f}" if row["error"] is not None else "-",
            Text(verdict, "" if row["verdict"] == "right" else COLOURS[1]),
        )
    console().print(table)


def warmup_json(result: Warmed) -> dict[str, Any]:
    return json_ready(result._asdict())  # type: ignore[no-any-return]


def show_warmup(result: Warmed) -> None:
    """`warmup`: how many kernels serve the layers."""
    out = console()
    out.print(
        f"{result.problems} problems of {', '.join(result.presets)} on {result.device}: "
        f"{result.kernels} distinct cubins, {result.compiled} compiled now, in {duration(result.seconds)} "
        f"by {result.workers} processes"
    )
    for kernel, reason in result.failed.items():
        out.print(Text(f"  FAILED {kernel}: {reason}", COLOURS[1]))


def show_status(found: dict[str, Any]) -> None:
    """`daemon status`."""
    out = console()
    for running in found["daemons"]:
        out.print(f"{running['device']}: running as {running['holder']} since {running['since']}, {running['doing']}")
    if not found["daemons"]:
        out.print("no daemon runs here")
    out.print(
        f"{counted(found['misses'], 'problem')} to tune, {found['failed']} given up, {found['leases']} being measured, "
        f"{found['winners']} tuned"
    )
