"""The commands of the tuner and its store: tune, plans, warmup, report, daemon."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .options import Device, Json
from .problem import KINDS

Preset = Annotated[
    list[str] | None,
    typer.Option("--preset", metavar="NAME", help="Layers of a model, such as deepseek-v3; repeatable."),
]


def tune(
    preset: Preset = None,
    m: Annotated[
        str | None,
        typer.Option(
            "--m", metavar="M,M,...", help="Rows of A (of one group if masked), or of a preset's dense layers."
        ),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Columns of D, rows of B.")] = None,
    k: Annotated[int | None, typer.Option("--k", min=16, help="Columns of A and B, a multiple of 16.")] = None,
    kind: Annotated[str, typer.Option(metavar="|".join(KINDS), help="Kind of problem.")] = "dense",
    groups: Annotated[int, typer.Option(min=1, help="Weights of a grouped problem.")] = 1,
    expected_m: Annotated[int, typer.Option(min=0, help="As the calls pass it; 0: not at all.")] = 0,
    row_scales: Annotated[
        bool,
        typer.Option(
            "--row-scales", metavar="", help="A's scales lie row-major (else column-major); each layout has its winner."
        ),
    ] = False,
    misses: Annotated[
        bool, typer.Option("--misses", metavar="", help="What calls asked for and the store lacked, most-called first.")
    ] = False,
    device: Device = None,
    num_sms: Annotated[
        str | None, typer.Option(metavar="S,S,...", help="Limits of SMs, each with a winner of its own; default: none.")
    ] = None,
    budget: Annotated[float | None, typer.Option(min=0.1, metavar="SECONDS", help="Stop after that time.")] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full", metavar="", help="Try all kernels but the hopeless, not only the best by the cost model."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure plans on this machine and keep the winners, which running processes take within a second.

    (Those that give the same bits; others at the next start, or by `fp8gemm.refresh()`.)

    Every plan is checked against a reference before it is timed. Exit codes: 0 all problems have a winner that is
    measured (or the budget is over); 1 one could not be tuned; 2 wrong options.
    """
    ms, limits, where = options.positives(m, "--m"), options.positives(num_sms, "--num-sms"), options.device(device)
    if kind not in KINDS:
        raise typer.BadParameter(f"{kind!r}; must be one of {', '.join(KINDS)}", param_hint="--kind")
    if k is not None and k % 16:
        raise typer.BadParameter(f"{k}; must be a multiple of 16", param_hint="--k")
    weight = (n, k) if n is not None and k is not None else None
    if (n is None) != (k is None) or (weight and ms is None) or (ms and not weight and not preset):
        raise typer.BadParameter("a problem needs --m, --n and --k, all three", param_hint="--m, --n, --k")
    if not weight and not preset and not misses:
        raise typer.BadParameter(
            "name problems by --preset, by --m, --n and --k, or by --misses", param_hint="--preset"
        )
    if (groups != 1 or expected_m) and kind == "dense":
        raise typer.BadParameter("a dense problem has neither", param_hint="--groups, --expected-m")
    if kind != "dense" and not weight:
        raise typer.BadParameter("goes with --m, --n and --k", param_hint="--kind")
    from . import render_tune
    from .tuner import presets, tune
    from .tuner.target import open_target
    from .tuner.writer import Writer

    target = open_target(where)
    try:
        if row_scales and target.device.is_cpu:
            raise typer.BadParameter("the CPU backend has one plan for both layouts", param_hint="--row-scales")
        rows = ms or (list(presets.CPU_ROWS) if target.device.is_cpu else None)
        problems = [p._replace(row_scales=row_scales) for name in preset or () for p in presets.preset(name, rows)]
        if weight:
            problems += [
                presets.called(KINDS.index(kind), m, *weight, groups, expected_m, row_scales) for m in ms or ()
            ]
        with Writer() as writer, render_tune.live(as_json) as show:
            tasks = presets.tasks(problems, target.device, limits)
            tasks = list(dict.fromkeys(tasks + (writer.misses(target.device) if misses else [])))
            outcomes = []
            for outcome in tune.run(target, writer, tasks, budget=budget, show=show, full=full):
                outcomes.append(outcome)
                show.finished(outcome)
    finally:
        target.close()
    if as_json:
        options.print_json(render_tune.outcomes_json(target, outcomes, len(tasks)))
    else:
        render_tune.show_outcomes(target, outcomes, len(tasks))
    raise typer.Exit(1 if any(outcome.failed for outcome in outcomes) else 0)


def warmup(
    preset: Preset = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compile into the cache every kernel that a model's layers need, for all rows from 1 to 8192. Nothing is run.

    Without a Hopper GPU: the default kernels of an H200, as for an image that will run there. Exit codes: 0 all are
    compiled; 1 one could not be; 2 wrong options.
    """
    where = options.device(device)
    if where == "cpu":
        raise typer.BadParameter("the CPU backend needs no kernels", param_hint="--device")
    from . import render_tune
    from .tuner import warmup

    with options.progress() as say:
        result = warmup.run(preset or ["deepseek-v3"], where, say)
    if as_json:
        options.print_json(render_tune.warmup_json(result))
    else:
        render_tune.show_warmup(result)
    raise typer.Exit(1 if result.failed else 0)


def report(
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one self-contained page: roofline, plans of each problem."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what the store knows: each tuned problem, how its plans compared, how far from the device's roofs it is.

    Exit codes: 0; 1 if the store or the file cannot be used.
    """
    from .tuner import report, report_html

    found = report.gather()
    if html is not None:
        html.write_text(report_html.page(found), encoding="utf-8")
        print(f"wrote {html}", file=sys.stderr)
    if as_json:
        options.print_json(report.as_json(found))
    elif html is None:
        report.show(found)


plans = typer.Typer(help="The store of measured plans: list, show, export, import, clear.", no_args_is_help=True)


@plans.command("list")
def list_plans(as_json: Json = False) -> None:
    """List the winners: problem, plan, time, the default plan's time. Exit code 1 if the store is unreadable."""
    from . import render_tune, store

    rows = store.rows("winners", "ORDER BY device, num_sms DESC, kind, n, k, groups, m")
    if as_json:
        options.print_json({"store": str(store.path()), "winners": [render_tune.row_json(row) for row in rows]})
    else:
        render_tune.show_winners(rows)


@plans.command("show")
def show_plans(
    m: Annotated[int, typer.Option("--m", min=1, help="Rows of A, of any bucket.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Columns of D.")],
    k: Annotated[int, typer.Option("--k", min=16, help="Columns of A.")],
    as_json: Json = False,
) -> None:
    """Show every measurement of a problem: the last sweep first, of each the fastest. Exit code 1 if there is none."""
    from . import planner, render_tune, store

    ended = "max(date) OVER (PARTITION BY sweep)"
    where = f"WHERE m = :m AND n = :n AND k = :k ORDER BY device, {ended} DESC, sweep, seconds IS NULL, seconds"
    rows = store.rows("measurements", where, {"m": planner.bucket(m), "n": n, "k": k})
    if as_json:
        measured = [render_tune.row_json(row) for row in rows]
        options.print_json({"store": str(store.path()), "measurements": measured})
    else:
        render_tune.show_measurements(rows)
    raise typer.Exit(0 if rows else 1)


@plans.command("export")
def export_plans(
    file: Annotated[Path, typer.Argument(help="The file to write.", metavar="FILE")],
    as_json: Json = False,
) -> None:
    """Write every winner into one portable file: a fleet tunes once, ranks agree. Exit code 1 if that fails."""
    from . import store
    from .tuner.writer import exported

    found = exported()
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    _tell({"file": str(file), "store": str(store.path()), "winners": len(found["winners"])}, as_json)


@plans.command("import")
def import_plans(
    file: Annotated[
        Path, typer.Argument(help="A file of `fp8gemm plans export`.", metavar="FILE", exists=True, dir_okay=False)
    ],
    as_json: Json = False,
) -> None:
    """Take the winners of an exported file over, in place of one's own. Exit code 1 if it is none, or some are odd."""
    from .errors import StoreError
    from .tuner.writer import Writer

    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        with Writer() as writer:
            taken, odd = writer.load(found)
    except ValueError as error:
        raise StoreError(f"{file}: {error}") from error
    _tell({"file": str(file), "imported": taken, "passed_over": odd}, as_json)
    raise typer.Exit(1 if odd else 0)


@plans.command("clear")
def clear_plans(
    misses: Annotated[bool, typer.Option("--misses", metavar="", help="Only what is to be tuned.")] = False,
    as_json: Json = False,
) -> None:
    """Delete winners, measurements and misses; running processes keep what they use. Exit code 1 if that fails."""
    from .tuner.writer import Writer

    with Writer() as writer:
        deleted = writer.clear(winners=not misses)
    _tell({"deleted": deleted} if as_json else {f"deleted {table}": n for table, n in deleted.items()}, as_json)


def _tell(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        options.print_json(facts)
    else:
        for name, value in facts.items():
            typer.echo(f"{name.replace('_', ' ')}: {value}")


daemon = typer.Typer(help="A process that tunes what calls missed: run, status, unit.", no_args_is_help=True)


@daemon.command("run")
def run_daemon(
    device: Device = None,
    share: Annotated[
        bool,
        typer.Option(
            "--share", metavar="", help="Work beside a serving process, in short bursts; else while it is idle."
        ),
    ] = False,
    memory: Annotated[
        float, typer.Option(min=0.1, metavar="GIB", help="With --share: most GPU memory that it takes.")
    ] = 4.0,
    duty: Annotated[
        float, typer.Option(min=0.01, max=1.0, metavar="0..1", help="With --share: share of the time that it measures.")
    ] = 0.1,
    once: Annotated[bool, typer.Option("--once", metavar="", help="End when there is nothing left to tune.")] = False,
    as_json: Json = False,
) -> None:
    """Tune misses as they come, most-called first, in the foreground; log to stderr. SIGTERM ends it within 2 seconds.

    Exit codes: 0 ended as asked; 1 something broke; 2 wrong options; 4 another daemon holds this device.
    """
    where = options.device(device)
    from .tuner import daemon

    result = daemon.run(where, daemon.Share(int(memory * 2**30), duty) if share else None, once)
    if as_json:
        options.print_json(result._asdict())
    raise typer.Exit(result.exit_code)


@daemon.command("status")
def daemon_status(as_json: Json = False) -> None:
    """Tell which daemons run here, what they hold and what waits. Exit codes: 0 one runs; 3 none does."""
    from . import render_tune
    from .tuner import daemon

    found = daemon.status()
    if as_json:
        options.print_json(found)
    else:
        render_tune.show_status(found)
    raise typer.Exit(0 if found["daemons"] else 3)


@daemon.command("unit")
def daemon_unit(
    device: Device = None,
    share: Annotated[bool, typer.Option("--share", metavar="", help="As for `daemon run`.")] = False,
    as_json: Json = False,
) -> None:
    """Print a systemd unit that runs the daemon with this Python and this cache directory. Exit code 0."""
    where = options.device(device)
    from .tuner import daemon

    text = daemon.unit(where, share)
    if as_json:
        options.print_json({"unit": text})
    else:
        typer.echo(text, nl=False)
