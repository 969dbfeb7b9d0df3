"""Parts of the GEMM kernel, compiled by g++ and run thread by thread: what its producer loads, what slices and
splits of K add up, what warps store.

`tests/emulation` stands in for the kernel's PTX: waits return at once, loads and copies are written down.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from fp8gemm import native
from fp8gemm.plan import Plan

HERE = Path(__file__).parent
KERNELS = HERE.parent / "native" / "kernels"
EMULATED = ("ptx.cuh", "wgmma.cuh")
PLANS = [
    Plan(128, 192, 4),
    Plan(256, 128, 3),
    Plan(192, 128, 4),
    Plan(64, 48, 5, cluster_n=2),
    Plan(32, 128, 6, split=2),
    Plan(64, 32, 4, depth=4),
    Plan(128, 64, 4, cluster_m=2, depth=2),
    Plan(256, 128, 3, cluster_n=2),
    Plan(128, 192, 4, cluster_m=2),
    Plan(128, 176, 4, cluster_m=2),
    Plan(64, 112, 4, depth=2),
    Plan(64, 64, 3, cluster_n=2, depth=4),
    Plan(8, 56, 5, depth=4, swap_ab=1),
    Plan(16, 96, 3, depth=2, split=2, swap_ab=1),
    Plan(64, 64, 6, cluster_m=2, depth=2, slices=2),
    Plan(64, 80, 5, cluster_m=2, depth=2, split=2, slices=2),
    Plan(64, 48, 5, cluster_n=2, split=2),
    Plan(64, 64, 6, cluster_m=2, depth=2, one_tile=1),
    Plan(64, 32, 4, cluster_n=2, depth=4, one_tile=1),
    Plan(8, 48, 4, depth=4, swap_ab=1, one_tile=1),
    Plan(64, 32, 8, depth=2, split=4, slices=2),
    Plan(64, 32, 4, depth=4, split=4),
]
SPLITS = [  # shares that are equal and not, of one wave and of two, of 32 rows
    Plan(64, 64, 4, depth=2, split=4),
    Plan(64, 64, 4, depth=2, split=3),
    Plan(64, 48, 5, depth=2, split=4),
    Plan(32, 80, 3, depth=2, split=3),
    Plan(128, 176, 3, split=4),
    Plan(256, 112, 3, split=3),
    Plan(192, 80, 3, split=4),
    Plan(128, 16, 8, split=2),
    Plan(64, 80, 5, cluster_m=2, depth=2, split=2, slices=2),
    Plan(64, 48, 6, depth=2, split=3, slices=2),
    Plan(64, 32, 8, depth=2, split=4, slices=2),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel's sources without those that are emulated, which quoted includes would find first."""
    folder = tmp_path_factory.mktemp("kernels")
    for path in KERNELS.glob("*.*h"):
        if path.name not in EMULATED:
            shutil.copy(path, folder)
    shutil.copy(KERNELS / "gemm.cu", folder)
    return folder


@pytest.mark.parametrize("role", ["operands", "scales"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_what_is_loaded(sources: Path, tmp_path: Path, plan: Plan, role: str) -> None:
    check(sources, tmp_path, plan, native.DENSE, role)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_what_consumers_wait_for(sources: Path, tmp_path: Path, plan: Plan) -> None:
    check(sources, tmp_path, plan, native.DENSE, "consumers")


@pytest.mark.parametrize("plan", [Plan(128, 192, 4), Plan(64, 96, 5)], ids=str)
def test_scales_of_ragged_groups(sources: Path, tmp_path: Path, plan: Plan) -> None:
    check(sources, tmp_path, plan, native.RAGGED, "ragged")


@pytest.mark.parametrize("plan", SPLITS, ids=str)
def test_sums_of_a_split(sources: Path, tmp_path: Path, plan: Plan) -> None:
    check(sources, tmp_path, plan, native.DENSE, "exchange")


@pytest.mark.parametrize("plan", SPLITS, ids=str)
def test_what_a_split_stores(sources: Path, tmp_path: Path, plan: Plan) -> None:
    check(sources, tmp_path, plan, native.DENSE, "share")


@pytest.mark.parametrize("one_tile", [0, 1])
@pytest.mark.parametrize("tile_n", [32, 96])
def test_sums_of_slices(sources: Path, tmp_path: Path, tile_n: int, one_tile: int) -> None:
    plan = Plan(64, tile_n, 4, cluster_m=2, depth=2, slices=2, one_tile=one_tile)
    check(sources, tmp_path, plan, native.DENSE, "slices")


@pytest.mark.parametrize(
    "plan",
    [Plan(128, 64, 4, depth=2), Plan(64, 64, 6, cluster_m=2, depth=2, slices=2)]
    + [Plan(64, n, 3, depth=2) for n in (16, 48, 96, 112, 128)],
    ids=str,
)
def test_what_warps_store(sources: Path, tmp_path: Path, plan: Plan) -> None:
    check(sources, tmp_path, plan, native.DENSE, "store")


def check(sources: Path, tmp_path: Path, plan: Plan, kind: int, role: str) -> None:
    """Compiles the role's program for the plan and runs it."""
    program = tmp_path / role
    facts = dict(plan.kernel(kind).macros) | {"TURN": plan.turn, "THREADS": plan.threads}
    macros = [f"-D{name}={value}" for name, value in facts.items()]
    command = ["g++", "-std=c++20", "-O1", "-w", "-Wno-psabi", f"-I{HERE / 'emulation'}", f"-I{sources}", *macros]
    subprocess.run([*command, str(HERE / "emulation" / f"{role}.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "ok\n")
