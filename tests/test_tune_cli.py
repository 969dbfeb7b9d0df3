"""The commands of the tuner: tune, plans, warmup, as a user calls them."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fp8gemm import backends, bench, compiler, live, native, planner, store
from fp8gemm.cli import app
from fp8gemm.errors import CompileError
from fp8gemm.problem import Problem
from fp8gemm.store import Task
from fp8gemm.tuner import presets

ROOT = Path(__file__).parent.parent
TINY = ("tune", "--device", "cpu", "--n", "64", "--k", "128")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FP8GEMM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("fp8gemm.tuner.cpu.SAMPLE", 0.0005)  # quick, if rough
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def call_json(*arguments: str) -> tuple[int, Any]:
    result = call(*arguments, "--json")
    return result.exit_code, json.loads(result.stdout)


def test_tune_and_the_next_process_uses_it() -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fp8gemm", *TINY, "--m", "1,20", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert (report["device"], report["asked"]) == ("cpu", 2)
    assert re.search(r"\[2/2\] about .* to go, 32x64x128", done.stderr)
    for problem, m in zip(report["problems"], (8, 32), strict=True):
        assert (problem["m"], problem["n"], problem["k"], problem["kind"]) == (m, 64, 128, "dense")
        assert 0 < problem["seconds"] <= problem["default_seconds"] * 1.5
        code = f"""
import json
from fp8gemm import native, planner
found = native.Problem(native.DENSE, native.CPU, 0, {m - 3}, 64, 128, 1, 1, 1, 1)
plan, from_store = planner.choose(planner.make_key(found))
print(json.dumps([plan._asdict(), from_store]))
"""
        later = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert json.loads(later.stdout) == [problem["plan"], True]


def test_tune_shows_default_and_tuned() -> None:
    result = call(*TINY, "--m", "1")
    assert result.exit_code == 0
    row = next(line for line in result.stdout.splitlines() if "8x64x128" in line)
    assert row.count("thread") == 2 or "the default" in row
    assert "%" in row
    assert str(store.path()) in result.stdout.replace("\n", "")


def test_tune_tells_how_far_behind_default_and_stored_plans_are() -> None:
    _, first = call_json(*TINY, "--m", "1,32")
    assert set(first["behind_the_best"]) == {"default"}
    ratios = [p["default_seconds"] / p["best_seconds"] for p in first["problems"]]
    assert first["behind_the_best"]["default"]["worst"] == pytest.approx(max(ratios))
    assert first["behind_the_best"]["default"]["geometric_mean"] == pytest.approx((ratios[0] * ratios[1]) ** 0.5)
    _, again = call_json(*TINY, "--m", "1,32", "--full")
    assert set(again["behind_the_best"]) == {"default", "stored"}
    assert again["behind_the_best"]["stored"]["problems"] == 2


def test_tune_misses() -> None:
    cpu = backends.cpu_device()
    task = Task(Problem(native.DENSE, 48, 64, 128), cpu.name, cpu.sms, cpu.sms)
    store.add_misses(store.path(), {task: 5})
    code, report = call_json("tune", "--misses", "--device", "cpu")
    assert (code, [problem["m"] for problem in report["problems"]]) == (0, [48])
    assert store.rows("misses") == []
    assert call_json("tune", "--misses", "--device", "cpu")[1]["problems"] == []


def test_tune_limits_and_kinds() -> None:
    cores = backends.cpu_threads()
    limits = sorted({1, cores})
    text = ",".join(map(str, limits))
    code, report = call_json(*TINY, "--m", "128", "--kind", "contiguous", "--groups", "2", "--num-sms", text)
    assert code == 0
    assert [problem["num_sms"] for problem in report["problems"]] == limits
    assert all(problem["plan"]["threads"] <= problem["num_sms"] for problem in report["problems"])
    code, report = call_json(*TINY, "--m", "64", "--kind", "masked", "--groups", "2", "--expected-m", "20")
    (problem,) = report["problems"]
    assert (code, problem["kind"], problem["groups"], problem["expected_m"]) == (0, "masked", 2, 16)


def test_problems_are_what_calls_look_up() -> None:
    """As their keys say it: expected_m of the masked kind is 1.2 times the mean, a layout of scales a GPU's affair."""
    rows = {
        native.DENSE: {0: 0, 20: 0, 96: 0},
        native.CONTIGUOUS: {0: 0, 20: 32, 96: 96},
        native.RAGGED: {0: 0, 20: 32, 96: 96},
        native.MASKED: {0: 0, 20: 16, 96: 80},
    }
    for kind, row_scales in itertools.product(rows, (False, True)):
        for expected_m, mean in rows[kind].items():
            found = native.Problem(kind, native.CPU, 0, 250, 64, 128, 2, True, True, True)
            problem = presets.called(kind, 250, 64, 128, 2, expected_m, row_scales)
            assert problem == Problem(kind, 256, 64, 128, 2, mean, row_scales)
            assert problem == planner.problem_of(planner.make_key(found, expected_m))._replace(row_scales=row_scales)
    code, report = call_json(*TINY, "--m", "250", "--kind", "masked", "--groups", "2", "--expected-m", "96")
    found = native.Problem(native.MASKED, native.CPU, 0, 250, 64, 128, 2, True, True, True)
    plan, from_store = planner.choose(planner.make_key(found, 96))
    assert (code, from_store) == (0, True)
    assert plan is not None
    assert plan._asdict() == report["problems"][0]["plan"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--n", "64", "--m", "8"], "--m, --n, --k"),
        (["--m", "8", "--misses"], "--m, --n, --k"),
        ([*TINY[1:], "--m", "8", "--groups", "2"], "--groups, --expected-m"),
        ([*TINY[1:], "--m", "8", "--expected-m", "2"], "--groups, --expected-m"),
        (["--preset", "llama3", "--kind", "masked"], "--kind"),
        ([*TINY[1:], "--m", "8", "--row-scales"], "--row-scales"),
    ],
    ids=repr,
)
def test_options_that_tune_would_have_to_ignore(options: list[str], words: str) -> None:
    result = call("tune", "--device", "cpu", *options)
    assert result.exit_code == 2
    assert words in result.output
    assert store.rows("winners") == []


def test_tune_within_a_budget() -> None:
    code, report = call_json("tune", "--device", "cpu", "--preset", "llama3", "--m", "16", "--budget", "0.1")
    assert code == 0
    assert len(report["problems"]) < report["asked"] == 4
    _, report = call_json("tune", "--device", "cpu", "--preset", "llama3", "--budget", "0.1")
    assert report["asked"] == 12, "a CPU is not asked for thousands of rows"


def test_tune_without_a_place_for_the_store(cache_dir: Path) -> None:
    (cache_dir / "cache").write_text("")
    result = call(*TINY, "--m", "1")
    assert result.exit_code == 1
    assert "plans.db cannot be written" in result.stderr


def test_plans() -> None:
    assert call_json("plans", "list")[1]["winners"] == []
    assert call("plans", "show", "--m", "1", "--n", "64", "--k", "128").exit_code == 1
    assert not store.path().exists(), "looking makes no store"
    assert call(*TINY, "--m", "1").exit_code == 0
    (winner,) = call_json("plans", "list")[1]["winners"]
    listed = call("plans", "list").stdout
    assert "8x64x128" in listed
    assert winner["plan"]["tile_n"] in backends.CPU_TILE_NS
    code, shown = call_json("plans", "show", "--m", "5", "--n", "64", "--k", "128")
    assert code == 0
    assert len(shown["measurements"]) >= 5
    text = call("plans", "show", "--m", "5", "--n", "64", "--k", "128").stdout
    assert "the default" in text
    assert text.count("right") == len(shown["measurements"])


def test_export_import_clear(cache_dir: Path) -> None:
    call(*TINY, "--m", "1,32")
    file = str(cache_dir / "plans.json")
    assert call_json("plans", "export", file) == (0, {"file": file, "store": str(store.path()), "winners": 2})
    before = store.rows("winners")
    code, cleared = call_json("plans", "clear")
    assert (code, cleared["deleted"]["winners"]) == (0, 2)
    assert store.rows("winners") == []
    assert call_json("plans", "import", file) == (0, {"file": file, "imported": 2, "passed_over": 0})
    assert store.rows("winners") == before
    Path(file).write_text("[]")
    result = call("plans", "import", file)
    assert (result.exit_code, "no export" in result.stderr) == (1, True)
    Path(file).write_text("{")
    assert call("plans", "import", file).exit_code == 1
    assert store.rows("winners") == before


@pytest.mark.parametrize("text", ["{}", "[]", '{"fp8gemm plans": 1}', '{"fp8gemm plans": 1, "winners": null}', "x"])
def test_what_is_no_export(cache_dir: Path, text: str) -> None:
    (cache_dir / "plans.json").write_text(text)
    result = call("plans", "import", str(cache_dir / "plans.json"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [("plans", "export", "/nonexistent/x.json"), ("report", "--html", "/nonexistent/x.html")], ids=str
)
def test_files_that_cannot_be_written(arguments: tuple[str, ...]) -> None:
    result = call(*arguments)
    assert result.exit_code == 1
    assert re.fullmatch(r"fp8gemm: .*/nonexistent/x.*\n", result.stderr)


def test_nothing_to_tell() -> None:
    assert call("tune", "--misses", "--device", "cpu").stdout == "nothing to tune\n"
    assert "No plans in" in call("plans", "list").stdout


def test_benchmarks_are_no_misses() -> None:
    assert call("bench", "--device", "cpu", "--shape", "64x128", "--m", "8", "--rounds", "1").exit_code == 0
    live.refresh()
    assert store.rows("misses") == []


def test_a_newer_store_is_an_error_to_people() -> None:
    import sqlite3

    call(*TINY, "--m", "1")
    connection = sqlite3.connect(store.path())
    connection.execute(f"PRAGMA user_version = {store.VERSION + 1}")
    connection.close()
    for arguments in (("plans", "list"), ("report",), (*TINY, "--m", "1"), ("daemon", "status")):
        result = call(*arguments)
        assert result.exit_code == 1
        assert "newer fp8gemm" in result.stderr


def test_warmup_compiles_the_distinct_kernels_once(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        compiler.compiler()
    except CompileError as error:
        pytest.skip(str(error))
    from fp8gemm.tuner import warmup

    monkeypatch.setattr(warmup, "MOST_ROWS", 8)
    monkeypatch.setattr("fp8gemm.device.hopper_devices", list)
    code, first = call_json("warmup", "--preset", "deepseek-v3")
    plans = [planner.default_plan(Problem(0, 8, n, k), bench.H200, 132) for n, k in bench.WEIGHTS]
    kernels = {plan.kernel(0) for plan in plans}  # type: ignore[union-attr]
    assert (code, first["problems"], first["failed"]) == (0, 7, {})
    assert first["kernels"] == first["compiled"] == len(kernels)
    cubins = list((Path(os.environ["FP8GEMM_CACHE_DIR"]) / "cubins").glob("*.cubin"))
    assert len(cubins) == len(kernels)
    assert call_json("warmup", "--preset", "deepseek-v3")[1]["compiled"] == 0
    text = " ".join(call("warmup").stdout.split())
    assert f"{len(kernels)} distinct cubins, 0 compiled now" in text


def test_warmup_tells_what_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8gemm.tuner import build, warmup

    class Broken(build.Builder):
        def __init__(self) -> None:
            self.workers = 1

        def submit(self, kernels: Any) -> int:
            return len(list(kernels))

        def results(self, kernels: Any, *_: Any) -> Any:
            return dict.fromkeys(kernels, "registers spill")

        def close(self) -> None: ...

    monkeypatch.setattr(warmup, "MOST_ROWS", 16)
    monkeypatch.setattr(warmup, "Builder", Broken)
    monkeypatch.setattr("fp8gemm.device.hopper_devices", list)
    result = call("warmup")
    assert result.exit_code == 1
    assert "registers spill" in result.stdout


def test_builders_see_no_gpu_and_stop_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        compiler.compiler()
    except CompileError as error:
        pytest.skip(str(error))
    from fp8gemm.plan import cast_kernel, tuner_kernels
    from fp8gemm.tuner.build import Builder

    builder = Builder(workers=1)
    heard: list[tuple[int, int]] = []
    try:
        found = builder.results([tuner_kernels()], lambda: False, lambda *n: heard.append(n))
        assert found == {tuner_kernels(): None}
        assert heard[-1] == (1, 1)
        assert builder.submit([tuner_kernels()]) == 0
        assert builder.results([cast_kernel(True, 0)], lambda: True) == {cast_kernel(True, 0): "stopped"}
    finally:
        builder.close()
