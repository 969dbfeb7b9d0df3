"""The command line: options in, exit codes out. What the commands do is in modules of their own, imported when needed.

Exit codes: 0 well; 1 a wrong result, or something broke; 2 wrong options, or this machine lacks what they ask for.
`doctor` adds 3: only the CPU backend can run.
"""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from . import __version__
from .errors import BackendUnavailable, Fp8GemmError, OperandError


class Commands(TyperGroup):
    """The group of commands; turns the library's errors into a line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Fp8GemmError, ImportError) as error:
            print(f"fp8gemm: {error}", file=sys.stderr)
            raise typer.Exit(2 if isinstance(error, (BackendUnavailable, OperandError)) else 1) from None


app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

Json = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON, and nothing else, to standard output.")]


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
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def doctor(as_json: Json = False) -> None:
    """Tell what this machine can run, and why; prove it with a small GEMM.

    Exit codes: 0 a Hopper GPU runs GEMMs; 3 only the CPU backend does; 1 nothing does.
    """
    from . import doctor, render_doctor

    with _progress() as say:
        say("examining this machine")
        report = doctor.examine()
    if as_json:
        _print_json(render_doctor.as_json(report))
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
    weights = None if not shape else [_weights(text) for text in shape]
    ms = None if m is None else [_positive(part, "--m") for part in m.split(",")]
    where = _device(device)
    from . import bench, render_bench

    with _progress() as say:
        result = bench.run(where, quick, weights, ms, rounds, say)
    if as_json:
        _print_json(render_bench.as_json(result))
    else:
        render_bench.show(result)
    raise typer.Exit(0 if result.right else 1)


def _positive(text: str, option: str) -> int:
    if not re.fullmatch(r"\s*0*[1-9]\d{0,8}\s*", text):
        raise typer.BadParameter(f"{text!r} is not a positive whole number", param_hint=option)
    return int(text)


def _weights(text: str) -> tuple[int, int]:
    n, separator, k = text.partition("x")
    if not separator:
        raise typer.BadParameter(f"{text!r}; must be NxK, such as 7168x2048", param_hint="--shape")
    pair = _positive(n, "--shape"), _positive(k, "--shape")
    if pair[1] % 16:
        raise typer.BadParameter(f"K = {pair[1]}; must be a multiple of 16", param_hint="--shape")
    return pair


def _device(text: str | None) -> str | None:
    if text is None or text == "cpu" or re.fullmatch(r"cuda:\d{1,2}", text):
        return text
    if text == "cuda":
        return "cuda:0"
    raise typer.BadParameter(f"{text!r}; must be cpu or cuda:N", param_hint="--device")


def _print_json(report: dict[str, Any]) -> None:
    typer.echo(json.dumps(report, indent=2, allow_nan=False))


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done, on stderr: in place on a terminal, else line by line."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda line: print(line, file=sys.stderr, flush=True)
        return
    with console.status("") as status:
        yield status.update
