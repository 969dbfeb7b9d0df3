"""What the store knows, put together: for each tuned problem its plans, its rates and the roofs above it."""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from fp8gemm import __version__, cost, device, store
from fp8gemm.backends import CpuPlan
from fp8gemm.errors import Fp8GemmError
from fp8gemm.plan import Plan
from fp8gemm.render import console, digits, duration, json_ready
from fp8gemm.store import Task

FLOP_PER_CYCLE = 2 * cost.MACS_PER_CYCLE  # of one SM, e4m3


class Timed(NamedTuple):
    """One plan that was measured, in seconds."""

    plan: str
    seconds: float
    spread: float
    is_default: bool
    is_winner: bool


class Tuned(NamedTuple):
    """One problem of the store. `plans`: of its last sweep, fastest first."""

    task: Task
    seconds: float
    default_seconds: float | None
    plan: str
    frugal: str | None
    frugal_seconds: float | None
    tuned: str
    plans: list[Timed]
    left_out: dict[str, int]  # verdict -> plans that were not timed

    @property
    def flops_per_second(self) -> float:
        return self.task.problem.flops / self.seconds

    @property
    def bytes_per_second(self) -> float:
        return self.task.problem.bytes / self.seconds

    @property
    def intensity(self) -> float:
        """FLOP a byte of A, B and D."""
        return self.task.problem.flops / self.task.problem.bytes

    @property
    def gain(self) -> float | None:
        """The default's time over the winner's."""
        return self.default_seconds / self.seconds if self.default_seconds else None


class Roofs(NamedTuple):
    """What a device could do at most, and how that is known."""

    flops_per_second: float
    bytes_per_second: float
    compute_source: str
    memory_source: str
    measured: bool  # the best that was seen, not what the hardware could do


class Chapter(NamedTuple):
    """One device of the report."""

    device: str
    sms: int
    roofs: Roofs
    tuned: list[Tuned]

    @property
    def gain(self) -> float | None:
        """Geometric mean of the default's time over the winner's."""
        gains = [t.gain for t in self.tuned if t.gain]
        return math.exp(sum(map(math.log, gains)) / len(gains)) if gains else None

    @property
    def is_cpu(self) -> bool:
        return self.roofs.measured


class Report(NamedTuple):
    store: str
    version: str
    chapters: list[Chapter]


def plan_text(text: str) -> str:
    """A stored plan in the words of its class; as it is stored if it is of a version to come."""
    for family in (Plan, CpuPlan):
        try:
            return str(family(**json.loads(text)))
        except (TypeError, ValueError):
            continue
    return text


def no_plans(path: str) -> str:
    """What is told of a store without winners."""
    return f"No plans in {path} yet. `fp8gemm tune --preset deepseek-v3` measures some."


def gather() -> Report:
    """Reads the store. Raises StoreError if that is not possible."""
    winners = store.rows("winners", "ORDER BY n * k DESC, n, k, kind, groups, num_sms DESC, m")
    sweeps: dict[Task, list[dict[str, Any]]] = {}
    for row in store.rows("measurements", "ORDER BY id"):
        sweeps.setdefault(Task.from_row(row), []).append(row)
    chapters = []
    for name, sms in dict.fromkeys((row["device"], row["sms"]) for row in winners):
        rows = [row for row in winners if (row["device"], row["sms"]) == (name, sms)]
        tuned = [_tuned(row, sweeps.get(Task.from_row(row), [])) for row in rows]
        clocks = [m["clock_hz"] for t in tuned for m in sweeps.get(t.task, []) if m["clock_hz"]]
        on_cpu = all(row["space"].startswith("cpu") for row in rows)
        chapters.append(Chapter(name, sms, _seen(tuned) if on_cpu else _roofs(name, sms, clocks, tuned), tuned))
    return Report(str(store.path()), __version__, chapters)


def _tuned(row: dict[str, Any], measured: list[dict[str, Any]]) -> Tuned:
    last = [m for m in measured if m["sweep"] == measured[-1]["sweep"] and m["space"] == row["space"]]
    timed = sorted((m for m in last if m["seconds"] is not None), key=lambda m: m["seconds"])
    plans = [
        Timed(plan_text(m["plan"]), m["seconds"], m["spread"], bool(m["is_default"]), m["plan"] == row["plan"])
        for m in timed
    ]
    left_out: dict[str, int] = {}
    for m in last:
        if m["seconds"] is None:
            left_out[m["verdict"]] = left_out.get(m["verdict"], 0) + 1
    frugal = plan_text(row["frugal_plan"]) if row["frugal_plan"] else None
    times = row["seconds"], row["default_seconds"]
    text = plan_text(row["plan"])
    return Tuned(Task.from_row(row), *times, text, frugal, row["frugal_seconds"], row["tuned"], plans, left_out)


def _roofs(name: str, sms: int, clocks: Sequence[float], tuned: Sequence[Tuned]) -> Roofs:
    """Of a Hopper GPU: the tensor cores' rate at the clock that was seen, the memory's as the driver tells it.

    Where the GPU is elsewhere, an H100's memory stands in, or the best that was seen if that is more.
    """
    clock, source = (max(clocks), "the highest seen") if clocks else (cost.CLOCK_HZ, "usual under load")
    compute = f"{sms} SMs x {FLOP_PER_CYCLE} FLOP per cycle x {clock / 1e9:.2f} GHz, {source}"
    bandwidth = _bandwidth(name)
    if bandwidth:
        return Roofs(sms * FLOP_PER_CYCLE * clock, bandwidth, compute, "the driver: memory clock x bus width", False)
    seen = _seen(tuned)
    bandwidth, memory = max((cost.DEFAULT_BANDWIDTH, "an H100's"), (seen.bytes_per_second, seen.memory_source))
    memory += ": this GPU is not here to be asked"
    return Roofs(sms * FLOP_PER_CYCLE * clock, bandwidth, compute, memory, False)


def _bandwidth(name: str) -> float:
    """Bytes per second that the driver tells of a GPU of that name in this machine; 0 if there is none."""
    try:
        here = [device.read_device(i) for i in device.hopper_devices()]
    except Fp8GemmError:
        return 0.0
    return next((gpu.memory_bandwidth for gpu in here if gpu.name == name), 0.0)


def _seen(tuned: Sequence[Tuned]) -> Roofs:
    """Of a CPU nobody tells the roofs: the best that was seen stands in."""
    flops, rate = max(t.flops_per_second for t in tuned), max(t.bytes_per_second for t in tuned)
    return Roofs(flops, rate, "the best of these problems", "the best of these problems", True)


def as_json(report: Report) -> dict[str, Any]:
    """Everything, in seconds, FLOP and bytes."""
    chapters = [
        {
            "device": chapter.device,
            "sms": chapter.sms,
            "roofs": chapter.roofs._asdict(),
            "geometric_mean_gain": chapter.gain,
            "problems": [_tuned_json(tuned) for tuned in chapter.tuned],
        }
        for chapter in report.chapters
    ]
    return json_ready({"store": report.store, "version": report.version, "devices": chapters})  # type: ignore[no-any-return]


def _tuned_json(tuned: Tuned) -> dict[str, Any]:
    rates = {
        "flops_per_second": tuned.flops_per_second,
        "bytes_per_second": tuned.bytes_per_second,
        "flop_per_byte": tuned.intensity,
        "gain": tuned.gain,
    }
    plans = [plan._asdict() for plan in tuned.plans]
    return tuned.task.row() | {k: v for k, v in tuned._asdict().items() if k != "task"} | rates | {"plans": plans}


def show(report: Report) -> None:
    """As tables."""
    out = console()
    if not report.chapters:
        out.print(no_plans(report.store))
    for chapter in report.chapters:
        unit, scale = ("GFLOP/s", 1e9) if chapter.is_cpu else ("TFLOP/s", 1e12)
        title = Text.assemble((chapter.device, "bold"), f"  {chapter.sms} {'cores' if chapter.is_cpu else 'SMs'}")
        table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("problem")
        table.add_column("plan", style="dim")
        for name in ("time", "default", "gain", unit, "of roof", "GB/s", "of roof", "plans"):
            table.add_column(name, justify="right", no_wrap=True)
        for t in chapter.tuned:
            table.add_row(
                t.task.name,
                t.plan,
                duration(t.seconds),
                duration(t.default_seconds) if t.default_seconds else "-",
                f"{t.gain - 1:+.1%}" if t.gain else "-",
                digits(t.flops_per_second / scale),
                f"{t.flops_per_second / chapter.roofs.flops_per_second:.0%}",
                digits(t.bytes_per_second / 1e9),
                f"{t.bytes_per_second / chapter.roofs.bytes_per_second:.0%}",
                str(len(t.plans)),
            )
        out.print(table)
        roofs = chapter.roofs
        out.print(Text(f"  {unit}: of {digits(roofs.flops_per_second / scale)}, {roofs.compute_source}", "dim"))
        out.print(Text(f"  GB/s: of {digits(roofs.bytes_per_second / 1e9)}, {roofs.memory_source}", "dim"))
        if chapter.gain:
            out.print(Text(f"  tuned plans are {chapter.gain:.3f}x as fast as default ones (geometric mean)\n", "bold"))
