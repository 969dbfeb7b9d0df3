"""The command line: exit codes, JSON that is clean, numbers that hold together, help for everything."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from fp8gemm import __version__, accuracy, bench, compiler, device, doctor, native, options, workbench
from fp8gemm.cli import app
from fp8gemm.errors import CompileError
from fp8gemm.gemm import gemm_fp8_fp8_bf16_nt
from fp8gemm.plan import Kernel
from fp8gemm.render import digits, duration, size

ROOT = Path(__file__).parent.parent
TINY = ("bench", "--device", "cpu", "--shape", "200x144", "--shape", "128x256", "--m", "1,70", "--rounds", "2")


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8GEMM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def no_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a Hopper GPU is: nothing is compiled just to see whether it can be."""
    monkeypatch.setattr(device, "hopper_devices", lambda: [0])


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def call_json(*arguments: str) -> tuple[int, Any]:
    """Exit code, and the parsed standard output: which must be JSON alone, without NaN."""

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no JSON")

    result = call(*arguments, "--json")
    return result.exit_code, json.loads(result.stdout, parse_constant=refuse)


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The program in a process of its own, which sees no GPU."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"} | environment
    command = [sys.executable, "-m", "fp8gemm", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in done.stderr
    return done


# ---- the program ----------------------------------------------------------------------------------------------------


def test_version() -> None:
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"fp8gemm {__version__}\n")


def test_no_arguments_show_help() -> None:
    result = call()
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("doctor", "bench", "--version", "Exit codes"))


def commands(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command, those of groups too, with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            assert command.help
            yield from commands(command, *names, name)
        else:
            yield (*names, name), command


def test_every_command_and_option_is_documented() -> None:
    found = dict(commands(typer.main.get_command(app)))
    assert {("doctor",), ("bench",), ("tune",), ("report",), ("warmup",), ("plans", "list"), ("daemon", "run")} <= set(
        found
    )
    for name, command in found.items():
        assert len(command.help.split()) > 5, name
        assert "Exit code" in command.help, name
        assert any("--json" in option.opts for option in command.params), name
        assert all(option.help for option in command.params), name
        assert call(*name, "--help").exit_code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("bench", "--no-such-option"),
        ("bench", "--device", "gpu"),
        ("bench", "--device", "cuda:x"),
        ("bench", "--m", "1,,2"),
        ("bench", "--m", "0"),
        ("bench", "--m", "-1"),
        ("bench", "--m", "1e3"),
        ("bench", "--shape", "128"),
        ("bench", "--shape", "128x"),
        ("bench", "--shape", "128x100"),
        ("bench", "--rounds", "0"),
        ("tune",),
        ("tune", "--m", "1", "--n", "64"),
        ("tune", "--n", "64", "--k", "128"),
        ("tune", "--m", "1", "--n", "64", "--k", "100"),
        ("tune", "--m", "1", "--n", "64", "--k", "128", "--kind", "sparse"),
        ("tune", "--preset", "gpt-2", "--device", "cpu"),
        ("tune", "--m", "1", "--n", "64", "--k", "128", "--device", "cpu", "--num-sms", "9999"),
        ("warmup", "--device", "cpu"),
        ("warmup", "--preset", "gpt-2"),
        ("plans", "import", "/nowhere"),
        ("daemon", "run", "--duty", "2"),
    ],
)
def test_wrong_options(arguments: tuple[str, ...]) -> None:
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr


def test_a_pipe_is_told_of_changes(capsys: pytest.CaptureFixture[str]) -> None:
    with options.progress() as say:
        for line in ("0 of 2", "0 of 2", "1 of 2", "1 of 2", "0 of 2"):
            say(line)
    assert capsys.readouterr() == ("", "0 of 2\n1 of 2\n0 of 2\n")


def test_imports_stay_light() -> None:
    code = "import sys, fp8gemm; bad = {'typer', 'rich', 'numpy'} & set(sys.modules); import fp8gemm.cli; "
    code += "sys.exit(str(bad) if bad else 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- doctor ---------------------------------------------------------------------------------------------------------


def test_doctor_without_a_gpu() -> None:
    done = run("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == report["exit_code"] == 3
    assert report["backend"] == "cpu"
    assert report["verdict"] == "No Hopper GPU: the CPU backend serves"
    assert report["reasons"]
    assert report["gpus"] == []
    (trial,) = report["trials"]
    assert trial["right"] is True
    assert trial["device"] == "cpu"
    assert 0.99 < trial["error_vs_rounding"] < 1.05
    assert report["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert report["cpu"]["features"] == native.library().cpu_features().decode()
    assert report["versions"]["fp8gemm"] == __version__
    assert report["versions"]["numpy"] == np.__version__
    assert set(report["compiler"]) == {"chosen", "kind", "version", "origin", "fits_driver", "error"}
    assert "FP8GEMM_CACHE_DIR" in report["environment"]


def test_doctor_text() -> None:
    result = call("doctor")
    verdict, *facts = result.stdout.splitlines()
    assert result.exit_code in (0, 3)
    assert verdict.startswith("GEMMs run on cuda:" if result.exit_code == 0 else ("No Hopper GPU", "The Hopper GPU"))
    for name in ("small GEMM", "GPUs", "driver", "compiler", "kernel cache", "CPU", "versions", "environment"):
        assert any(line.startswith(name) for line in facts), name


def test_doctor_with_nothing_in_order(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("doctor", "--json", FP8GEMM_CACHE_DIR=str(tmp_path / "file" / "x"), FP8GEMM_COMPILER="/nowhere/nvcc")
    report = json.loads(done.stdout)
    assert done.returncode == 3
    assert report["trials"][0]["right"] is True
    assert report["cache"]["writable"] is False
    assert report["compiler"]["chosen"] == "/nowhere/nvcc"
    assert report["compiler"]["kind"] is None
    assert "/nowhere/nvcc" in report["compiler"]["error"]
    assert sum("kernel cache" in reason or "/nowhere/nvcc" in reason for reason in report["reasons"]) == 2


def test_doctor_counts_the_cache(tmp_path: Path) -> None:
    cubins = tmp_path / "cache" / "cubins"
    cubins.mkdir(parents=True, mode=0o700)
    (cubins / "a.cubin").write_bytes(b"x" * 1000)
    (cubins / "b.cubin").write_bytes(b"x" * 500)
    (cubins / "b.lock").write_bytes(b"")
    found = call_json("doctor")[1]["cache"]
    assert (found["entries"], found["bytes"], found["writable"], found["writable_by_others"]) == (2, 1500, True, False)
    cubins.chmod(0o777)
    report = call_json("doctor")[1]
    assert report["cache"]["writable_by_others"] is True
    assert any("a cubin is code" in reason for reason in report["reasons"])


def test_doctor_without_the_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("libfp8gemm.so is missing")

    monkeypatch.setattr(native, "library", missing)
    code, report = call_json("doctor")
    assert (code, report["backend"], report["cpu"]["features"]) == (1, None, None)
    assert report["verdict"] == "Nothing here runs GEMMs"
    assert "libfp8gemm.so is missing" in report["reasons"]
    assert call("doctor").exit_code == 1


def test_doctor_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_gpus", list)
    monkeypatch.setattr(doctor, "_multiply", lambda where: time.sleep(3))
    monkeypatch.setattr(doctor, "PATIENCE", 0.2)
    code, report = call_json("doctor")
    assert code == 1
    assert "no answer" in report["trials"][0]["error"]


def test_doctor_sees_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_gpus", list)
    monkeypatch.setattr("fp8gemm.backends.run", lambda *_: None)  # leaves the poison
    code, report = call_json("doctor")
    assert code == 1
    assert report["trials"][0]["right"] is False
    assert report["trials"][0]["error_vs_rounding"] is None  # NaN
    assert any("wrong numbers" in reason for reason in report["reasons"])


def test_doctor_falls_back_from_a_gpu_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = doctor.Gpu(0, "NVIDIA H200", "9.0", 132, None, 60 << 20, True)
    ampere = doctor.Gpu(1, "NVIDIA A100", "8.0", 108, 80 << 30, 40 << 20, False)
    monkeypatch.setattr(doctor, "_driver", lambda: doctor.Driver("13.0", "580.95.05", None))
    monkeypatch.setattr(doctor, "_gpus", lambda: [hopper, ampere])
    original = doctor._multiply

    def multiply(where: str) -> Any:
        if where == "cuda:0":
            raise CompileError("no compiler\nlog")
        return original(where)

    monkeypatch.setattr(doctor, "_multiply", multiply)
    code, report = call_json("doctor")
    assert code == 3
    assert report["verdict"] == "The Hopper GPU cannot be used: the CPU backend serves"
    assert [trial["right"] for trial in report["trials"]] == [False, True]
    assert "cuda:0: no compiler" in report["reasons"]
    assert any("cuda:1 is a NVIDIA A100" in reason for reason in report["reasons"])
    monkeypatch.setattr(doctor, "_multiply", lambda where: original("cpu"))
    result = call("doctor")
    assert result.exit_code == 0
    assert result.stdout.startswith("GEMMs run on cuda:0 NVIDIA H200\n")
    assert "80 GiB" in result.stdout


# ---- bench ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_builds")
def test_bench_numbers() -> None:
    code, report = call_json(*TINY)
    assert (code, report["right"], report["builds"]) == (0, True, [])
    sizes = [(c["m"], c["n"], c["k"]) for c in report["cases"]]
    assert sizes == [(1, 200, 144), (70, 200, 144), (1, 128, 256), (70, 128, 256)]
    for case in report["cases"]:
        m, n, k = case["m"], case["n"], case["k"]
        assert case["flops_per_second"] == pytest.approx(2 * m * n * k / case["seconds"])
        assert case["bytes_per_second"] == pytest.approx((m * k + n * k + 2 * m * n) / case["seconds"])
        assert 1e-3 < case["rounding_error"] < 3e-3  # bf16 has 8 bits
        assert case["error"] / case["rounding_error"] == pytest.approx(case["error_vs_rounding"])
        assert 0.99 < case["error_vs_rounding"] < 1.05
        assert case["rows_checked"] == min(m, 64)
        for peer in case["peers"].values():
            assert peer["ratio"] == pytest.approx(peer["seconds"] / case["seconds"])
    for name in ("numpy", "numpy_f32"):
        ratios = [case["peers"][name]["ratio"] for case in report["cases"]]
        assert report["geometric_means"][name] == pytest.approx(math.prod(ratios) ** (1 / len(ratios)))
        assert report["peers"][name]
    assert (report["device"], report["rounds"], report["statistic"]) == ("cpu", 2, "best")
    assert report["reduced"] == []
    assert report["versions"] == {"fp8gemm": __version__, "numpy": np.__version__}
    assert report["date"].endswith("+00:00")


@pytest.mark.usefixtures("no_builds")
def test_bench_says_when_the_machine_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "busy_share", lambda: 0.5)
    assert "Other programs kept 50% of this machine's cores busy" in call(*TINY).stdout
    assert call_json(*TINY)[1]["busy"] == 0.5
    monkeypatch.setattr(bench, "busy_share", lambda: 0.1)
    assert "Other programs" not in call(*TINY).stdout


def test_the_busy_share_is_a_share() -> None:
    assert 0 <= workbench.busy_share(0.05) <= 1


def test_bench_in_a_process_of_its_own() -> None:
    done = run("bench", "--quick", "--shape", "96x128", "--m", "5", "--json", FP8GEMM_COMPILER="/nowhere/nvcc")
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert (report["right"], report["compiler"], report["builds"]) == (True, None, [])
    assert "/nowhere/nvcc" in report["compiler_error"]
    assert "5 x 96 x 128" in done.stderr
    assert report["cases"][0]["plan"].endswith("columns")


def test_bench_on_a_gpu_that_is_not_there() -> None:
    done = run("bench", "--device", "cuda:0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fp8gemm: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.usefixtures("no_builds")
@pytest.mark.parametrize("width", [100, 160])
def test_bench_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    result = call(*TINY)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert max(map(len, lines)) <= width
    rows = [line.split() for line in lines if line.split()[1:3] in (["200", "144"], ["128", "256"])]
    assert [row[0] for row in rows] == ["1", "70", "1", "70"]
    assert all("1.000" in row for row in rows)
    assert " ".join(lines[-2:]).replace("  ", " ").endswith("4 of 4 results right")


def spoiled(original: Callable[..., Any], spoil: Callable[[Any, int], None]) -> Callable[..., Any]:
    """A GEMM with a fault: `spoil(d, calls before)` after the work."""
    calls = 0

    def multiply(lhs: Any, rhs: Any, d: Any) -> Any:
        nonlocal calls
        original(lhs, rhs, d)
        spoil(d, calls)
        calls += 1
        return d

    return multiply


def flip_a_sign(d: Any, calls: int) -> None:
    d[3, np.argmax(d[3] & 0x7FFF)] ^= 0x8000


def leave_one_out(d: Any, calls: int) -> None:
    d[3, 7] = accuracy.POISON


def halve_precision(d: Any, calls: int) -> None:
    d &= 0xFFFE


def change_later(d: Any, calls: int) -> None:
    d[69, 0] ^= calls > 0


@pytest.mark.usefixtures("no_builds")
@pytest.mark.parametrize("spoil", [flip_a_sign, leave_one_out, halve_precision, change_later])
def test_bench_sees_a_wrong_result(spoil: Callable[[Any, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("bench", "--device", "cpu", "--shape", "200x144", "--m", "70", "--rounds", "1")
    monkeypatch.setattr("fp8gemm.workbench.CPU_ROWS", 70)
    original = gemm_fp8_fp8_bf16_nt
    monkeypatch.setattr(bench, "gemm_fp8_fp8_bf16_nt", spoiled(original, spoil))
    code, report = call_json(*arguments)
    assert (code, report["right"]) == (1, False)
    case = report["cases"][0]
    assert case["repeats"] is (spoil not in (change_later, leave_one_out))
    if spoil is change_later:
        assert case["error_vs_rounding"] < 1.05
    elif spoil is leave_one_out:
        assert case["error"] is None
    else:
        assert case["error_vs_rounding"] > 1.05
    monkeypatch.setattr(bench, "gemm_fp8_fp8_bf16_nt", spoiled(original, spoil))
    result = call(*arguments)
    assert result.exit_code == 1
    assert ("CHANGES" if spoil is change_later else "WRONG") in result.stdout


def test_bench_compiles_hopper_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        made_by = compiler.compiler()
    except CompileError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(device, "hopper_devices", list)
    monkeypatch.setattr(bench, "BUILD_PROBLEMS", bench.BUILD_PROBLEMS[:2])
    arguments = ("bench", "--device", "cpu", "--shape", "32x32", "--m", "2", "--rounds", "1")
    code, report = call_json(*arguments)
    assert code == 0
    assert report["compiler"]["version"] == made_by.version
    assert len(report["builds"]) == 2
    for build in report["builds"]:
        assert build["error"] is None
        assert 16 <= build["registers"] <= 255
        assert build["spills"] == 0
        assert 16 << 10 < build["shared_bytes"] <= bench.H200.shared_bytes
        assert build["cubin_bytes"] > 4096
        assert build["seconds"] > 0

    def fail(kernel: Kernel) -> compiler.Built:
        raise CompileError("registers spill", "log")

    monkeypatch.setattr(compiler, "build", fail)
    result = call(*arguments)
    assert result.exit_code == 1
    assert "registers spill" in result.stdout
    assert "2 of 2 kernels not compiled" in " ".join(result.stdout.split())


def test_what_is_measured_by_default() -> None:
    everything = bench.plan_job(on_cpu=False, quick=False)
    assert (len(everything.weights), everything.ms, everything.reduced) == (7, (1, 64, 4096), ())
    quick = bench.plan_job(on_cpu=True, quick=True)
    assert set(quick.weights) < set(everything.weights)
    assert "32768 x 512" in quick.reduced[0]
    assert str(max(quick.ms)) in quick.reduced[1]
    chosen = bench.plan_job(True, True, [(128, 128)], [7], 2)
    assert chosen == bench.Job(((128, 128),), (7,), 2, ())


# ---- what both rest on ----------------------------------------------------------------------------------------------


def test_e4m3_and_bf16() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(accuracy.e4m3_values(np, np.float64), expected)
    x = np.random.default_rng(0).standard_normal(10_000, dtype=np.float32) * np.float32(1e3)
    x[:3] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, -0.0  # two ties
    bits = accuracy.to_bf16(np, x)
    np.testing.assert_array_equal(bits, x.astype(ml_dtypes.bfloat16).view(np.uint16))
    np.testing.assert_array_equal(accuracy.from_bf16(np, bits), x.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_reference_in_parts_is_the_reference() -> None:
    rng = np.random.default_rng(0)
    m, n, k = 5, 300, 200
    q = [rng.integers(0, 127, shape, dtype=np.uint8) for shape in ((m, k), (n, k))]
    s = [rng.random(shape, dtype=np.float32) for shape in ((m, 2), (3, 2))]
    values = accuracy.e4m3_values(np, np.float64)
    a = values[q[0]] * np.repeat(s[0], 128, 1)[:, :k]
    b = values[q[1]] * np.repeat(np.repeat(s[1], 128, 0)[:n], 128, 1)[:, :k]
    d = (a @ b.T).astype(ml_dtypes.bfloat16)
    whole, parts = (
        accuracy.summarise(accuracy.reference_errors(np, (q[0], s[0]), (q[1], s[1]), d.view(np.uint16), columns))
        for columns in (4096, 128)
    )
    assert parts == pytest.approx(whole)
    assert whole.right
    rounding = np.linalg.norm(d.astype(np.float64) - a @ b.T) / np.linalg.norm(a @ b.T)
    assert whole.error == pytest.approx(rounding, rel=1e-6)


def test_units() -> None:
    assert [duration(x) for x in (4.126e-6, 0.0123, 0.9999, 12.3)] == ["4.13 us", "12.3 ms", "1.00 s", "12.3 s"]
    assert [digits(x) for x in (0.0812, 1.0, 45.67, 1234.6)] == ["0.08", "1.00", "45.7", "1235"]
    assert [size(x) for x in (12, 232448, 3 << 20, 141 << 30)] == ["12 bytes", "227 KiB", "3 MiB", "141 GiB"]


@pytest.mark.usefixtures("no_builds")
def test_bench_times_the_default_beside_a_tuned_plan() -> None:
    """Only where the store has another plan than the cost model's; the plan that is shown is the one that runs."""
    from fp8gemm import backends, planner, store
    from fp8gemm.problem import Problem
    from fp8gemm.tuner.writer import Stamp, Winner, Writer

    cpu = backends.cpu_device()
    tuned = backends.CpuPlan(1, 48)
    with Writer() as writer:
        task = store.Task(Problem(native.DENSE, 80, 200, 144), cpu.name, cpu.sms, cpu.sms)
        writer.publish(task, store.space(cpu), Winner(tuned, 1e-3, 0.0, tuned, 1e-3), Stamp("", "", ""))
    planner.forget()
    store.mirror().refresh()
    code, report = call_json(*TINY)
    cases = {(c["m"], c["n"]): c for c in report["cases"]}
    assert code == 0
    assert [key for key, c in cases.items() if "default" in c["peers"]] == [(70, 200)]
    assert cases[70, 200]["plan"] == str(tuned)
    assert report["peers"]["default"]
    planner.forget()
