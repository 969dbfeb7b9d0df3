"""The tuner's GPU half on a stub driver that computes nothing: what it asks of cuda-python and of our library works.

What it measures on a real GPU is for tests/test_gpu.py.
"""

import contextlib
import functools
import inspect
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import bench_kernels
import pytest
import stub

from fp8gemm import compiler, native, store
from fp8gemm.errors import BackendUnavailable
from fp8gemm.plan import Kernel, Plan
from fp8gemm.problem import Problem
from fp8gemm.tuner import gpu, presets, space, tune
from fp8gemm.tuner.gpu import GpuTarget
from fp8gemm.tuner.writer import Writer

HERE = Path(__file__).parent
DENSE = Problem(native.DENSE, 64, 576, 1024)


@pytest.fixture(scope="module")
def tuner_stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuner-stub")
    stub.build(folder)
    library, source = str(folder / stub.DRIVER), str(HERE / "stub_tuner_driver.cpp")
    subprocess.run(["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return folder


def on_stub(test: Callable[[], object]) -> Callable[[Path, Path], None]:
    """Runs the test in a new interpreter, whose driver is the stub, with a cache of its own."""

    @functools.wraps(test)
    def run(tuner_stub: Path, tmp_path: Path) -> None:
        code = f"import {test.__module__} as module; module.{test.__name__}.__wrapped__()"
        env = stub.environment(tuner_stub, FP8GEMM_CACHE_DIR=str(tmp_path))
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env, cwd=stub.ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("tuner_stub", "tmp_path")]
    )
    return run


def target(**options: object) -> GpuTarget:
    stub.quiet()
    gpu.FLUSH_BYTES = 1 << 20  # filled by hand here
    return GpuTarget(0, **options)  # type: ignore[arg-type]


@on_stub
def test_every_kind_is_tuned_and_all_memory_given_back() -> None:
    device = target()
    problems = [
        DENSE,
        DENSE._replace(row_scales=True),
        Problem(native.CONTIGUOUS, 384, 256, 512, 4),
        Problem(native.RAGGED, 384, 256, 512, 4),
        Problem(native.MASKED, 64, 256, 512, 4, 32),
    ]
    tasks = presets.tasks(problems, device.device, [132, 100])
    with Writer() as writer:
        outcomes = list(tune.run(device, writer, tasks))
    assert device.lock_name == "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
    for outcome in outcomes:
        assert outcome.winner, outcome
        assert isinstance(outcome.winner.plan, Plan)
        assert outcome.winner.plan.num_sms <= outcome.task.num_sms
        assert outcome.winner.default_seconds
        assert outcome.winner.seconds <= outcome.winner.default_seconds
        assert store.plan(outcome.task.problem, device.device, outcome.task.num_sms) == outcome.winner.plan
    assert {row["verdict"] for row in store.rows("measurements")} == {"right"}
    assert stub.flag("stub_allocated").value == 0, "nothing is held between problems"
    device.close()


@on_stub
def test_a_plan_with_wrong_output_does_not_win() -> None:
    device = target()
    (task,) = presets.tasks([DENSE], device.device)
    with Writer() as writer:
        (first,) = tune.run(device, writer, [task])
        assert first.winner
        assert isinstance(first.winner.plan, Plan)
        stub.flag("stub_wrong_shared").value = max(first.winner.plan.shared_bytes, 116 << 10)  # launch.cpp's least
        (second,) = tune.run(device, writer, [task])
    assert second.winner
    assert isinstance(second.winner.plan, Plan)
    assert second.winner.plan.shared_bytes != first.winner.plan.shared_bytes
    assert "wrong" in {row["verdict"] for row in store.rows("measurements")}
    device.close()


@on_stub
def test_rounds_with_slow_flushes_do_not_count_beside_others() -> None:
    (task,) = presets.tasks([DENSE], target().device)
    for share, expected in ((True, [4, 4]), (False, [8, 8])):
        device = target(share=share)
        rig = device.rig(task)
        plans = space.kernels(task, device.device)[:2]
        assert [rig.error(plan) for plan in plans] == [1.0, 1.0]
        rig.times(plans, 1)  # learns how long a flush takes
        stub.flag("stub_slow_flushes").value = 16
        found = rig.times(plans, 8)
        assert sum(map(len, found)) == sum(expected)
        assert all(1e-5 < seconds < 3e-5 for times in found for seconds in times)
        stub.flag("stub_slow_flushes").value = 0
        rig.close()
        device.close()


@on_stub
def test_the_gpu_rests_as_long_as_it_multiplies() -> None:
    for share in (False, True):
        device = target(share=share)
        (task,) = presets.tasks([DENSE], device.device)
        plans = space.kernels(task, device.device)[:3]
        rig = device.rig(task)
        assert [rig.error(plan) for plan in plans] == [1.0, 1.0, 1.0]
        rests: list[float] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("time.sleep", rests.append)
            patch.setattr(gpu, "BURST", 1e-4)
            found = rig.times(plans, 40)
        if share:
            assert rests == [], "beside others the daemon rests"
        else:
            assert sum(rests) == pytest.approx(sum(map(sum, found)), rel=0.01)
            assert len(rests) > 10
            assert max(rests) < 1.5e-4, "a burst is one launch longer at most"
        rig.close()
        device.close()


@on_stub
def test_a_kernel_is_loaded_several_times_but_beside_others() -> None:
    device, shared = target(), target(share=True)
    (task,) = presets.tasks([DENSE], device.device)
    plan = space.kernels(task, device.device)[0]
    rig = device.rig(task)
    rig.error(plan)
    again = device.loads(plan, native.DENSE)
    assert len(set(again)) == gpu.LOADS - 1
    assert device.loads(plan, native.DENSE) == again, "once for all problems"
    assert shared.loads(plan, native.DENSE) == []
    final = device.final_loads(plan, native.DENSE)
    assert len({*again, *final}) == gpu.LOADS - 1 + gpu.FINAL_LOADS, "others in a final"
    assert device.loads(plan, native.DENSE) == again
    assert shared.final_loads(plan, native.DENSE) == []
    used = []
    for renew in (False, True):
        if renew:
            rig.renew([plan])
        first = stub.driver().stub_launch_count()
        rig.times([plan], gpu.FINAL_LOADS)
        used.append({launch["function"] for launch in stub.launches(first)})
    assert [len(functions) for functions in used] == [gpu.LOADS, gpu.FINAL_LOADS]
    assert not used[0] & used[1]
    rig.close()
    device.close()
    shared.close()


@on_stub
def test_operands_take_turns_too() -> None:
    """As many copies as there is room for; beside others one."""
    cases: list[tuple[dict[str, object], int, int]] = [
        ({}, 1 << 30, 8),
        ({"share": True}, 1 << 30, 1),
        ({}, 6_300_000, 3),
    ]
    for options, room, copies in cases:
        device = target(**options)
        gpu.RESERVE = (4 << 30) - room  # of the stub's 4 GiB
        (task,) = presets.tasks([DENSE], device.device)
        rig = device.rig(task)
        plans = space.kernels(task, device.device)[:2]
        assert [rig.error(plan) for plan in plans] == [1.0, 1.0]
        first = stub.driver().stub_launch_count()
        for count in (5, 2 * gpu.LOADS - 5):
            rig.times(plans, count)
        used = [tuple(launch["pointers"]) for launch in stub.launches(first)]
        rounds = [set(used[i : i + 2]) for i in range(0, len(used), 2)]
        assert {len(some) for some in rounds} == {1}, "all plans use the same in a round"
        assert len(set(used)) == copies
        assert rounds[: gpu.LOADS] == rounds[gpu.LOADS :], "in turns"
        rig.close()
        device.close()


@on_stub
def test_there_is_not_always_room() -> None:
    big = Problem(native.DENSE, 65536, 65536, 128)
    for options, problem in (({}, big), ({"share": True, "memory_bytes": 128 << 20}, DENSE._replace(m=8192))):
        device = target(**options)
        before = stub.flag("stub_allocated").value
        (task,) = presets.tasks([problem], device.device)
        with pytest.raises(BackendUnavailable, match="room"):
            device.rig(task)
        assert stub.flag("stub_allocated").value == before
        with Writer() as writer:
            (outcome,) = tune.run(device, writer, [task])
        assert outcome.failed
        device.close()


@on_stub
def test_without_nvml_nobody_knows_whether_it_is_idle() -> None:
    device = target()
    assert device.clock_hz() is None
    with pytest.raises(BackendUnavailable, match="--share"):
        device.is_idle()
    device.close()


@on_stub
def test_other_kernels_are_timed_beside_these() -> None:
    """`tests/bench_kernels.py`: macros reach the other kernels and none of these."""
    target().close()
    built: list[Kernel] = []
    make = compiler.cubin

    def cubin(kernel: Kernel, may_build: bool = True) -> bytes:
        built.append(kernel)
        return make(kernel, may_build)

    kernels, shapes = str(HERE.parent / "native" / "kernels"), "64x576x1024,4096x512x512"
    with mock.patch.object(compiler, "cubin", cubin):
        bench_kernels.main([kernels, "--shape", shapes, "--plans", "2", "--rounds", "5", "--define", "OTHER=3"])
    gemms = {kernel for kernel in built if kernel.function == "fp8gemm_gemm"}
    others = {kernel for kernel in gemms if ("OTHER", 3) in kernel.macros}
    assert len(gemms) == 2 * len(others) == 8


@on_stub
def test_named_plans_of_groups_are_timed() -> None:
    target().close()
    kernels = str(HERE.parent / "native" / "kernels")
    plan = "tile_m=64,tile_n=96,stages=4,raster=2,b_policy=evict_first"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        options = ["--kind", "masked", "--groups", "4", "--expected-m", "20", "--shape", "64x256x512", "--rounds", "5"]
        bench_kernels.main([kernels, kernels, *options, "--plan", plan])
    assert "64x256x512 masked 4 groups of" in out.getvalue()
    assert "64x96 stages 4 sms 132 raster 2 evict_first" in out.getvalue()
    assert out.getvalue().count("times as long (geometric mean of 1)") == 2
