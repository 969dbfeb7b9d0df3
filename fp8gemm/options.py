"""What the commands share: options and how they are read, JSON, progress on stderr."""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", metavar="", help="Print JSON, and nothing else, to standard output.")]
Device = Annotated[
    str | None, typer.Option("--device", metavar="cuda:N|cpu", help="By default a Hopper GPU, else the CPU.")
]


def positive(text: str, option: str) -> int:
    """A whole number above zero. Raises BadParameter, naming the option."""
    if not re.fullmatch(r"\s*0*[1-9]\d{0,8}\s*", text):
        raise typer.BadParameter(f"{text!r} is not a positive whole number", param_hint=option)
    return int(text)


def positives(text: str | None, option: str) -> list[int] | None:
    """Several of them, separated by commas."""
    return None if text is None else [positive(part, option) for part in text.split(",")]


def weights(text: str) -> tuple[int, int]:
    """(N, K) of "NxK"."""
    n, separator, k = text.partition("x")
    if not separator:
        raise typer.BadParameter(f"{text!r}; must be NxK, such as 7168x2048", param_hint="--shape")
    pair = positive(n, "--shape"), positive(k, "--shape")
    if pair[1] % 16:
        raise typer.BadParameter(f"K = {pair[1]}; must be a multiple of 16", param_hint="--shape")
    return pair


def device(text: str | None) -> str | None:
    """ "cpu", "cuda:0", or None for the best there is."""
    if text is None or text == "cpu" or re.fullmatch(r"cuda:\d{1,2}", text):
        return text
    if text == "cuda":
        return "cuda:0"
    raise typer.BadParameter(f"{text!r}; must be cpu or cuda:N", param_hint="--device")


def print_json(report: Any) -> None:
    """To standard output."""
    typer.echo(json.dumps(report, indent=2, allow_nan=False))


def _print_changes() -> Callable[[str], None]:
    """A function that prints a line to stderr, unless it is the one printed last."""
    last = ""

    def say(line: str) -> None:
        nonlocal last
        if line != last:
            last = line
            print(line, file=sys.stderr, flush=True)

    return say


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done, on stderr: in place on a terminal, else a line for each change."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _print_changes()
        return
    with console.status("") as status:
        yield status.update
