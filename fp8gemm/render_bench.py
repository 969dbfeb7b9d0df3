"""How `fp8gemm bench` shows its result."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from . import __version__
from .bench import Build, Case, Result
from .peers import DEFAULT, DESCRIPTIONS
from .render import COLOURS, console, digits, duration, json_ready, size
from .workbench import CPU_ROWS

TITLES = {
    DEFAULT: "default plan",
    "numpy": "NumPy",
    "numpy_f32": "NumPy f32",
    "cublaslt_block": "cuBLASLt block",
    "cublaslt_tensor": "cuBLASLt tensor",
    "deep_gemm": "DeepGEMM",
}
TIMING = {
    "best": "best of {} rounds in which all take turns, caches warm",
    "median": "median of {} rounds in which all take turns, L2 flushed, between two CUDA events (which count 1-3 us)",
}
BUSY = 0.2  # share of the cores from which a warning is due


def as_json(result: Result) -> dict[str, Any]:
    """Everything measured, in seconds, bytes and FLOP."""
    bench, job = result.bench, result.job
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": bench.device,
        "hardware": bench.hardware,
        "versions": {"fp8gemm": __version__, **bench.versions},
        "busy": result.busy,
        "rounds": job.rounds,
        "statistic": bench.statistic,
        "reduced": job.reduced,
        "cases": [_case_json(case) for case in result.cases],
        "peers": {name: DESCRIPTIONS[name] for name in result.geometric_means},
        "peers_left_out": bench.left_out,
        "geometric_means": result.geometric_means,
        "compiler": result.compiler._asdict() if result.compiler else None,
        "compiler_error": result.compiler_error,
        "builds": [_build_json(build) for build in result.builds],
        "right": result.right,
    }
    return json_ready(report)  # type: ignore[no-any-return]


def _case_json(case: Case) -> dict[str, Any]:
    p, check = case.problem, case.check
    return {
        "m": p.m,
        "n": p.n,
        "k": p.k,
        "plan": case.plan,
        "seconds": case.seconds,
        "flops_per_second": case.flops_per_second,
        "bytes_per_second": case.bytes_per_second,
        "error": check.error,
        "rounding_error": check.rounding,
        "error_vs_rounding": check.ratio,
        "worst_row_vs_rounding": check.worst_row,
        "rows_checked": check.rows,
        "repeats": case.repeats,
        "right": case.right,
        "peers": {name: {"seconds": s, "ratio": s / case.seconds} for name, s in case.peers.items()},
    }


def _build_json(build: Build) -> dict[str, Any]:
    p, built = build.problem, build.built
    return {
        "m": p.m,
        "n": p.n,
        "k": p.k,
        "plan": build.plan,
        "shared_bytes": build.shared_bytes,
        "registers": built.registers if built else None,
        "spills": built.spills if built else None,
        "cubin_bytes": len(built.cubin) if built else None,
        "seconds": built.seconds if built else None,
        "error": build.error,
    }


def show(result: Result) -> None:
    """The tables, what they mean, and the sum of it."""
    out = console()
    out.print(_cases_table(result))
    if result.busy > BUSY:
        warning = f"Other programs kept {result.busy:.0%} of this machine's cores busy: times and ratios mislead."
        out.print(Padding(Text(warning, "bold yellow"), (0, 0, 0, 2), expand=False))
    for note in _notes(result):
        out.print(Padding(Text(note, "dim"), (0, 0, 0, 2), expand=False))
    out.print()
    if result.builds:
        out.print(_builds_table(result))
    elif result.compiler_error:
        out.print(Text(f"No Hopper kernels were compiled: {result.compiler_error}\n", "yellow"))
    out.print(_conclusion(result))


def _table(heading: str, about: str) -> Table:
    title = Text.assemble((heading, "bold"), f"  {about}")
    return Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _cases_table(result: Result) -> Table:
    bench, peers = result.bench, list(result.geometric_means)
    unit, scale = ("GFLOP/s", 1e9) if bench.device == "cpu" else ("TFLOP/s", 1e12)
    table = _table(f"fp8gemm {__version__} on {bench.device}", bench.hardware)
    for name in ("M", "N", "K"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("plan", style="dim")
    for name in ("time", unit, "GB/s", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in peers:
        table.add_column(f"vs {TITLES[name]}", justify="right")
    for case, after in zip(result.cases, [*result.cases[1:], None], strict=True):
        p = case.problem
        rates = digits(case.flops_per_second / scale), digits(case.bytes_per_second / 1e9)
        ratios = [_ratio(case.peers[name] / case.seconds) if name in case.peers else Text("-") for name in peers]
        last = after is None or after.problem[2:] != p[2:]
        sizes = (str(x) for x in (p.m, p.n, p.k))
        table.add_row(*sizes, case.plan, duration(case.seconds), *rates, _error(case), *ratios, end_section=last)
    return table


def _error(case: Case) -> Text:
    if case.right:
        return Text(f"{case.check.ratio:.3f}", "green")
    return Text(f"{case.check.ratio:.3g} WRONG" if not case.check.right else "CHANGES", "bold red")


def _ratio(x: float) -> Text:
    return Text(f"{x:.2f}x", "green" if x >= 1 else "yellow")


def _notes(result: Result) -> Iterator[str]:
    bench, worst = result.bench, max((case.check.worst_row for case in result.cases), default=0.0)
    yield f"time: {TIMING[bench.statistic].format(result.job.rounds)}"
    rows = f"in up to {CPU_ROWS} random rows" if bench.device == "cpu" else "in all rows"
    yield (
        f"error: of D against the float64 product of the dequantised operands, {rows}, over the error of merely "
        f"rounding that to bf16; at most {worst:.3f} in any one row"
    )
    if result.geometric_means:
        yield "vs: the other's time over ours; above 1 fp8gemm is faster"
    for name in result.geometric_means:
        yield f"vs {TITLES[name]}: {DESCRIPTIONS[name]}"
    for name, reason in bench.left_out.items():
        yield f"without {TITLES[name]}: {reason}"
    for line in result.job.reduced:
        yield f"reduced: {line}"


def _builds_table(result: Result) -> Table:
    made_by = f"{result.compiler.kind} {result.compiler.version}" if result.compiler else ""
    table = _table("Hopper kernels built here", f"default plans for an H200, by {made_by}")
    for name in ("for M", "N", "K"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("plan")
    for name in ("regs", "spills", "shared", "cubin", "time"):
        table.add_column(name, justify="right")
    for build in result.builds:
        p, built = build.problem, build.built
        sizes = (str(x) for x in (p.m, p.n, p.k))
        if built is None:
            table.add_row(*sizes, build.plan, Text(f"FAILED: {(build.error or '').splitlines()[0]}", "bold red"))
            continue
        numbers = str(built.registers), str(built.spills), size(build.shared_bytes), size(len(built.cubin))
        table.add_row(*sizes, build.plan, *numbers, duration(built.seconds))
    return table


def _conclusion(result: Result) -> Text:
    wrong = sum(not case.right for case in result.cases)
    text = Text()
    if result.geometric_means:
        text = Text.assemble("fp8gemm is ", *_means(result.geometric_means), " (geometric means); ")
    total = len(result.cases)
    verdict = f"{wrong} of {total} results WRONG" if wrong else f"{total} of {total} results right"
    text.append(verdict, COLOURS[1 if wrong else 0])
    if failed := sum(build.built is None for build in result.builds):
        text.append(f"; {failed} of {len(result.builds)} kernels not compiled", COLOURS[1])
    return text


def _means(means: Mapping[str, float]) -> Sequence[Text | str]:
    parts: list[Text | str] = []
    for name, ratio in means.items():
        parts += [", " if parts else "", Text(f"{ratio:.2f}x", "bold"), f" as fast as {TITLES[name]}"]
    return parts
