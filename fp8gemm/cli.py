"""The command line: options in, exit codes out. What the commands do is in modules of their own, imported when needed.

Exit codes: 0 well; 1 a wrong result, or something broke; 2 wrong options, or this machine lacks what they ask for.
`doctor` and `daemon` add 3 and 4, and say so.
"""

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import __version__, cli_tuner, options
from .errors import BackendUnavailable, Fp8GemmError, OperandError
from .options import Json


class Commands(TyperGroup):
    """The group of commands; turns the library's errors into a line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Fp8GemmError, ImportError, OSError) as error:
            print(f"fp8gemm: {error}", file=sys.stderr)
            raise typer.Exit(2 if isinstance(error, (BackendUnavailable, OperandError)) else 1) from None


app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fp8gemm {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", callback=_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """FP8 GEMMs with fine-grained scales for NVIDIA Hopper, and a CPU backend for every other machine.

    Exit codes: 0 well; 1 a wrong result, or something broke; 2 wrong options, or this machine lacks what they ask for.
    `doctor` and `daemon` add 3 and 4, and say so.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def doctor(as_json: Json = False) -> None:
    """Tell what this machine can run, and why; prove it with a small GEMM.

    Exit codes: 0 a Hopper GPU runs GEMMs; 3 only the CPU backend does; 1 nothing does.
    """
    from . import doctor, live, render_doctor

    with options.progress() as say, live.uncounted():
        say("examining this machine")
        report = doctor.examine()
    if as_json:
        options.print_json(render_doctor.as_json(report))
    else:
        render_doctor.show(report)
    raise typer.Exit(report.exit_code)


@app.command()
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", metavar="", help="Fewer rounds, and on a CPU fewer products.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(metavar="cuda:N|cpu", help="Where to run; by default a Hopper GPU, else the CPU.")
    ] = None,
    m: Annotated[
        str | None, typer.Option("--m", metavar="M,M,...", help="Rows of A; by default 1,64,4096, fewer on a CPU.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NxK", help="Rows x columns of B, again for more; by default DeepSeek-V3's weights."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="How often each contender is timed.")] = None,
    as_json: Json = False,
) -> None:
    """Multiply DeepSeek-V3's weights: check every result, time it beside what you would call otherwise.

    On a GPU that is cuBLASLt (through PyTorch) and DeepGEMM, where installed; on a CPU, NumPy. Without a Hopper GPU a
    few of its kernels are compiled, too. Exit code 1 if a result is wrong or a kernel does not compile.
    """
    weights = None if not shape else [options.weights(text) for text in shape]
    ms = options.positives(m, "--m")
    where = options.device(device)
    from . import bench, live, render_bench

    with options.progress() as say, live.uncounted():
        result = bench.run(where, quick, weights, ms, rounds, say)
    if as_json:
        options.print_json(render_bench.as_json(result))
    else:
        render_bench.show(result)
    raise typer.Exit(0 if result.right else 1)


app.command()(cli_tuner.tune)
app.command()(cli_tuner.warmup)
app.command()(cli_tuner.report)
app.add_typer(cli_tuner.plans, name="plans")
app.add_typer(cli_tuner.daemon, name="daemon")
