"""How `fp8gemm doctor` shows its report."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .doctor import Compiler, Driver, Gpu, Report, Trial
from .render import COLOURS, console, duration, json_ready, size


def as_json(report: Report) -> dict[str, Any]:
    """Every fact of the report."""
    return json_ready(asdict(report) | {"exit_code": report.exit_code})  # type: ignore[no-any-return]


def show(report: Report) -> None:
    """The verdict, why, and the facts."""
    out = console()
    out.print(Text(report.verdict, COLOURS[report.exit_code]))
    for reason in report.reasons:
        out.print(Padding(Text(reason), (0, 0, 0, 2), expand=False))
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, line in _facts(report):
        facts.add_row(name, Text(line))
    out.print()
    out.print(facts)


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    for i, trial in enumerate(report.trials):
        yield "small GEMM" if i == 0 else "", _trial_line(trial)
    for i, gpu in enumerate(report.gpus):
        yield "GPUs" if i == 0 else "", _gpu_line(gpu)
    if not report.gpus:
        yield "GPUs", "none"
    yield "driver", _driver_line(report.driver)
    yield "compiler", _compiler_line(report.compiler)
    extra = report.versions["nvidia-cuda-nvrtc-cu12"]
    yield "", f"NVRTC {extra} (fp8gemm[cu12]) for CUDA 12 drivers" if extra else "fp8gemm[cu12] is not installed"
    cache = report.cache
    state = f"{cache.entries} kernels, {size(cache.bytes)}" if cache.writable else "not writable"
    yield "kernel cache", f"{cache.directory}: {state}"
    cpu = report.cpu
    yield "CPU", f"{cpu.name}, {cpu.cores} cores, " + (cpu.features or f"no backend: {cpu.error}")
    yield "versions", ", ".join(f"{name} {version}" for name, version in report.versions.items() if version)
    settings = [f"{name}={value}" for name, value in report.environment.items()]
    yield "environment", " ".join(settings) or "no FP8GEMM_ variable is set"


def _trial_line(trial: Trial) -> str:
    where = f"{' x '.join(map(str, trial.shape))} on {trial.device}: "
    if trial.error:
        return where + f"failed after {duration(trial.seconds)}"
    result = "right" if trial.right else "WRONG"
    return (
        where + f"{result}, error {trial.error_vs_rounding:.3f} of bf16 rounding, first call {duration(trial.seconds)}"
    )


def _gpu_line(gpu: Gpu) -> str:
    memory = f"{size(gpu.memory_bytes)}, " if gpu.memory_bytes else ""
    return f"cuda:{gpu.id} {gpu.name}, {gpu.capability}, {gpu.sms} SMs, {memory}L2 {size(gpu.l2_bytes)}"


def _driver_line(driver: Driver) -> str:
    release = f"release {driver.release}" if driver.release else ""
    return ", ".join(filter(None, [f"CUDA {driver.cuda}" if driver.cuda else "none", release]))


def _compiler_line(found: Compiler) -> str:
    if found.kind is None:
        return f"none (FP8GEMM_COMPILER is {found.chosen!r})"
    fits = {None: "", True: ", fits the driver", False: ", TOO NEW for the driver"}[found.fits_driver]
    return f"{found.kind} {found.version}{fits}, {found.origin}"
