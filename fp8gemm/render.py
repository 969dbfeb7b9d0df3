"""What the command line's displays share: the console, units, JSON without NaN."""

import math
import os
from collections.abc import Mapping
from typing import Any

from rich.console import Console

PIPED_WIDTH = 140  # columns where the output is no terminal
COLOURS = {0: "bold green", 1: "bold red", 3: "bold yellow"}  # by exit code


def console() -> Console:
    """Standard output, wide enough for the tables where it is a file or a pipe."""
    terminal = Console(highlight=False, soft_wrap=False)
    piped = not terminal.is_terminal and "COLUMNS" not in os.environ
    return Console(highlight=False, width=PIPED_WIDTH) if piped else terminal


def json_ready(value: Any) -> Any:
    """The value with NaN and infinities, which JSON lacks, as null."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("us", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            return f"{digits(seconds * scale)} {unit}"
    return f"{digits(seconds)} s"


def counted(count: int, noun: str) -> str:
    """With its plural, where that takes an s."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def size(count: float) -> str:
    """Bytes, in powers of 1024."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.0f} GiB"


def digits(x: float) -> str:
    """Three significant digits, more only before the point."""
    return f"{x:.{max(0, 2 - math.floor(math.log10(x))) if 1 <= x < 1000 else 0 if x >= 1000 else 2}f}"
