"""The report: figures that hold together, a page that needs nothing but itself."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from references import H100, WEIGHTS
from typer.testing import CliRunner

from fp8gemm import backends, native, planner, store
from fp8gemm.backends import CpuPlan
from fp8gemm.cli import app
from fp8gemm.device import Device
from fp8gemm.problem import Problem
from fp8gemm.store import AnyPlan, Task
from fp8gemm.tuner import report, report_html, space
from fp8gemm.tuner.writer import Measurement, Stamp, Winner, Writer

CPU = Device("a <CPU> & more", (0, 0), 8, 0, 0, 0.0, 0.0)


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FP8GEMM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def tuned(problem: Problem, device: Device, seconds: float, num_sms: int | None = None) -> None:
    """A sweep with made-up times: the second plan wins, the first is the default."""
    task = Task(problem, device.name, device.sms, num_sms or device.sms)
    plans: list[AnyPlan] = space.kernels(task, device)[:5]
    clock = None if device.is_cpu else 1.7e9
    found = [
        Measurement(plan, i == 0, None, seconds * (1 + 0.1 * abs(i - 1)), seconds / 500, clock, 30, 1.0, "right")
        for i, plan in enumerate(plans)
    ]
    found[-1] = found[-1]._replace(seconds=None, spread=None, verdict="wrong")
    with Writer() as writer:
        writer.measured(task, store.space(device), "s", found)
        winner = Winner(plans[1], seconds, seconds / 500, plans[0], 1.1 * seconds)
        writer.publish(task, store.space(device), winner, Stamp("", "", ""))


@pytest.fixture
def gathered() -> report.Report:
    for n, k in WEIGHTS:
        for m in (16, 256, 4096):
            p = Problem(native.DENSE, m, n, k)
            tuned(p, H100, max(p.flops / 1.2e15, p.bytes / 2.5e12, 4e-6))
    tuned(Problem(native.MASKED, 256, 4096, 7168, 4, 64), H100, 1e-4)
    tuned(Problem(native.DENSE, 64, 2112, 7168), H100, 2e-5, num_sms=96)
    tuned(Problem(native.DENSE, 64, 576, 7168), CPU, 1e-3)
    return report.gather()


def test_figures_hold_together(gathered: report.Report) -> None:
    assert {chapter.device for chapter in gathered.chapters} == {H100.name, CPU.name}
    for chapter in gathered.chapters:
        assert chapter.gain == pytest.approx(1.1)
        for t in chapter.tuned:
            p = t.task.problem
            assert t.flops_per_second == pytest.approx(p.flops / t.seconds)
            assert t.intensity == pytest.approx(t.flops_per_second / t.bytes_per_second)
            assert (len(t.plans), t.left_out) == (4, {"wrong": 1})
            assert [plan.is_winner for plan in t.plans] == [True, False, False, False]
            assert sum(plan.is_default for plan in t.plans) == 1
            assert t.plans[0].plan == t.plan


def test_roofs_say_where_they_come_from(gathered: report.Report) -> None:
    gpu, cpu = sorted(gathered.chapters, key=lambda chapter: chapter.is_cpu)
    assert gpu.roofs.flops_per_second == pytest.approx(132 * 8192 * 1.7e9)
    assert "1.70 GHz" in gpu.roofs.compute_source
    assert gpu.roofs.memory_source.startswith("an H100's")
    assert cpu.roofs.measured
    assert cpu.roofs.flops_per_second == max(t.flops_per_second for t in cpu.tuned)


def test_nothing_is_above_the_roof_of_a_gpu_that_is_elsewhere() -> None:
    fast = Problem(native.DENSE, 16, 7168, 16384)
    tuned(fast, H100, fast.bytes / 4.2e12)
    (chapter,) = report.gather().chapters
    assert chapter.roofs.bytes_per_second == chapter.tuned[0].bytes_per_second == pytest.approx(4.2e12)
    assert chapter.roofs.memory_source.startswith("the best of these problems")


def test_the_last_sweep_counts() -> None:
    problem = Problem(native.DENSE, 64, 576, 7168)
    tuned(problem, CPU, 1e-3)
    task = Task(problem, CPU.name, CPU.sms, CPU.sms)
    with Writer() as writer:
        again = Measurement(CpuPlan(8, 64), True, None, 5e-4, 1e-6, None, 30, 1.0, "right")
        writer.measured(task, store.space(CPU), "later", [again])
        writer.publish(
            task, store.space(CPU), Winner(CpuPlan(8, 64), 5e-4, 1e-6, CpuPlan(8, 64), 5e-4), Stamp("", "", "")
        )
    ((found,),) = [chapter.tuned for chapter in report.gather().chapters]
    assert [plan.seconds for plan in found.plans] == [5e-4]
    assert found.plans[0].is_winner
    assert found.plans[0].is_default


def test_an_imported_plan_has_no_measurements() -> None:
    tuned(Problem(native.DENSE, 64, 576, 7168), CPU, 1e-3)
    with Writer() as writer:
        writer.connection.execute("DELETE FROM measurements")
    assert "imported" in report_html.page(report.gather())


class Page(HTMLParser):
    """Tags that are closed, and everything that could reach out."""

    VOID = frozenset({"meta", "br", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [
            f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")
        ]
        assert tag not in ("script", "link", "iframe", "img", "object")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_stands_alone(gathered: report.Report) -> None:
    text = report_html.page(gathered)
    page = Page()
    page.feed(text)
    assert (page.open, page.links) == ([], [])
    assert not re.search(r"https?:|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text
    words = " ".join(page.text)
    for needed in (
        H100.name,
        CPU.name,
        "16x2112x7168",
        "masked 4 groups of 64",
        "on 96",
        "+10.0% over the default",
        "TFLOP/s",
    ):
        assert needed in words, needed
    assert words.count("winner's") >= len(WEIGHTS) * 3, "readable as text: every problem has its table"


def test_every_drawing_is_well_formed_and_in_its_frame(gathered: report.Report) -> None:
    drawings = re.findall(r"<svg.*?</svg>", report_html.page(gathered), re.DOTALL)
    assert len(drawings) == 2 + sum(len(chapter.tuned) for chapter in gathered.chapters)
    for drawing in drawings:
        tree = ElementTree.fromstring(drawing)
        _, _, width, height = map(float, tree.attrib["viewBox"].split())
        for circle in tree.iter("circle"):
            assert 0 <= float(circle.attrib["cx"]) <= width
            assert 0 <= float(circle.attrib["cy"]) <= height
        for line in tree.iter("polyline"):
            for point in line.attrib["points"].split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= width
                assert 0 <= y <= height
    winners = [drawing.count("var(--win)") for drawing in drawings if "times of the plans" in drawing]
    assert set(winners) == {1}


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["report", *arguments])


def test_the_command(gathered: report.Report, tmp_path: Path) -> None:
    shown = call().stdout
    assert H100.name in shown
    assert "1.100x as fast as default" in shown
    file = tmp_path / "page.html"
    result = call("--html", str(file), "--json")
    assert result.exit_code == 0
    assert file.read_text().startswith("<!DOCTYPE html>")
    found = json.loads(result.stdout)
    assert [len(device["problems"]) for device in found["devices"]] in ([23, 1], [1, 23])


def test_nothing_tuned_yet() -> None:
    assert "No plans" in call().stdout
    assert json.loads(call("--json").stdout)["devices"] == []
    assert "No plans yet" in report_html.page(report.gather())


def test_plans_in_words() -> None:
    plan = planner.default_plan(Problem(0, 64, 2112, 7168), H100, 132)
    assert report.plan_text(store.plan_json(plan)) == str(plan)
    assert report.plan_text(store.plan_json(backends.CpuPlan(2, 64))) == "2 threads, 64 columns"
    assert report.plan_text('{"of": "a version to come"}') == '{"of": "a version to come"}'


def test_work_of_masked_problems() -> None:
    """Of the rows that are expected, not of all that there is room for."""
    assert Problem(native.MASKED, 1024, 64, 128, 32, 48).flops == 2 * 32 * 48 * 64 * 128
    assert Problem(native.MASKED, 16, 64, 128, 32, 48).flops == Problem(native.MASKED, 16, 64, 128, 32).flops
    assert Problem(native.MASKED, 16, 64, 128, 32).bytes == 32 * (16 * 128 + 64 * 128 + 2 * 16 * 64)
