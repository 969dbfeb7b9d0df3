"""Kernels from source, without a GPU: what the cost model can pick compiles, spills nothing, and uses the hardware.

Both supported NVRTCs build in processes of their own, at the same time; the tests read what came out.
"""

import concurrent.futures
import functools
import itertools
import json
import math
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from references import H100, HOPPERS, WEIGHTS

from fp8gemm import CompileError, compiler, cost, native, plan
from fp8gemm.plan import Kernel, Plan, cast_kernel, copy_kernel, reference_kernel
from fp8gemm.problem import KINDS, Problem
from fp8gemm.sass import texts

VERSIONS = {"12.9": 12, "13": 13}
ROWS = (1, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192, 16384)
SHAPES = [*WEIGHTS, *itertools.product((64, 136, 512, 1536, 3072, 8192, 18432, 129280), (128, 512, 2048, 8192))]


def picked(kind: int, rows: tuple[int, ...], groups: int = 1, shapes: list[tuple[int, int]] = SHAPES) -> set[Kernel]:
    """Every GEMM kernel that the cost model picks over these sizes, on whole GPUs and on a part of one."""
    return {
        cost.default_plan(Problem(kind, m, n, k, groups), gpu, sms).kernel(kind)
        for gpu, sms in [(gpu, gpu.sms) for gpu in HOPPERS[:4]] + [(H100, 77)]
        for (n, k), m in itertools.product(shapes, rows)
    }


@functools.cache
def kernels() -> list[Kernel]:
    """What is built: the dense space that can be picked, sliced K, a sample of each grouped kind, everything small."""
    found = sorted(picked(native.DENSE, ROWS))
    pairs = Plan(64, 64, 6, cluster_m=2, depth=2, slices=2)
    wider = pairs._replace(tile_n=80, stages=5, split=2)
    found += [p.kernel(native.DENSE) for p in (pairs, pairs._replace(one_tile=1), wider)]
    for kind in (native.CONTIGUOUS, native.RAGGED, native.MASKED):
        some = sorted(picked(kind, (64, 2048, 16384), 8, [(4096, 7168), (7168, 2048), (576, 512)]))
        found += some[:: max(1, len(some) // 3)]
        space = plan.compiled_space(kind, H100)
        found += [p.kernel(kind) for p in (space[0], space[-1])]  # the least tile and the widest
    found += [reference_kernel(kind) for kind in range(4)]
    found += [cast_kernel(per_block, kind) for per_block in (False, True) for kind in range(3)]
    return list(dict.fromkeys([*found, copy_kernel()]))


class Outcome(NamedTuple):
    """One kernel's build, by one compiler."""

    log: str
    seconds: float
    registers: int
    path: str  # of the cubin
    same: bool  # a second build, where there was one, gave the same bytes


class Run(NamedTuple):
    compiler: list[str]  # kind, version, origin
    builds: dict[str, Outcome]  # by name()


def name(kernel: Kernel) -> str:
    return "_".join([kernel.function.removeprefix("fp8gemm_"), *(str(value) for _, value in kernel.macros)])


def main(major: int, wanted: Path, folder: Path) -> None:
    """In a process of its own: builds all that is wanted by that NVRTC and prints what came out, as JSON."""
    if major == 12 and not compiler.preload_nvrtc_12():
        raise SystemExit("nvidia-cuda-nvrtc-cu12 is not installed")
    outcomes = {}
    for index, kernel in enumerate(pickle.loads(wanted.read_bytes())):
        built = compiler.build(kernel)
        path = folder / f"{name(kernel)}.cubin"
        path.write_bytes(built.cubin)
        same = index % 5 > 0 or compiler.build(kernel).cubin == built.cubin  # that they are repeatable: a sample
        outcomes[name(kernel)] = Outcome(built.log, built.seconds, built.registers, str(path), same)
    print(json.dumps([list(compiler.compiler()), outcomes]))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The builds of each NVRTC."""
    folder = tmp_path_factory.mktemp("cubins")
    wanted = folder / "kernels"
    wanted.write_bytes(pickle.dumps(kernels()))
    started = {}
    for version, major in VERSIONS.items():
        (folder / version).mkdir()
        command = [sys.executable, __file__, str(major), str(wanted), str(folder / version)]
        paths = [str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        started[version] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    printed = {version: process.communicate()[0] for version, process in started.items()}  # of all, whichever failed
    found = {}
    for version, text in printed.items():
        assert started[version].returncode == 0, f"NVRTC {version} did not build everything; its error is above"
        made_by, outcomes = json.loads(text)
        found[version] = Run(made_by, {key: Outcome(*fields) for key, fields in outcomes.items()})
    return found


@pytest.fixture(scope="session", params=list(VERSIONS))
def run(request: pytest.FixtureRequest, runs: dict[str, Run]) -> Run:
    return runs[request.param]


def test_both_compilers_ran(runs: dict[str, Run]) -> None:
    for version, run in runs.items():
        kind, found, origin = run.compiler
        assert kind == "nvrtc"
        assert found.startswith(version)
        assert Path(origin).name == f"libnvrtc.so.{VERSIONS[version]}"


def test_everything_compiles(run: Run) -> None:
    assert set(run.builds) == {name(kernel) for kernel in kernels()}
    gemms = [key for key in run.builds if key.startswith("gemm")]
    assert len(gemms) > 25
    for kind in range(4):
        assert sum(dict(kernel.macros).get("KIND") == kind for kernel in kernels()) >= 4


def test_no_spills(run: Run) -> None:
    """Nor a stack, nor a wgmma made to wait, nor setmaxnreg ignored."""
    for key, built in run.builds.items():
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", built.log)
        assert frames, f"{key}: the log tells nothing of the stack:\n{built.log}"
        assert set(frames) == {("0", "0", "0")}, f"{key}:\n{built.log}"
        assert "warning" not in built.log.lower(), f"{key}:\n{built.log}"
        assert not re.search(r"C75\d\d", built.log), f"{key}:\n{built.log}"
        assert 16 <= built.registers <= 255


def test_registers_allow_the_launch(run: Run) -> None:
    """A CTA of 384 threads has 168 registers a thread; setmaxnreg then moves them from the producer."""
    for kernel in kernels():
        if kernel.source == "gemm.cu":
            threads = Plan(dict(kernel.macros)["TILE_M"], 16, 2, slices=dict(kernel.macros)["SLICES"]).threads
            assert run.builds[name(kernel)].registers * threads <= 65536


def test_builds_are_repeatable(run: Run) -> None:
    assert all(built.same for built in run.builds.values())


def test_compile_time(runs: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    """Told, not judged: the median should be below a second."""
    for version, run in runs.items():
        seconds = [built.seconds for key, built in run.builds.items() if key.startswith("gemm")]
        with capsys.disabled():
            print(
                f"\nNVRTC {version}: {len(seconds)} GEMM kernels, median {statistics.median(seconds):.2f} s, ", end=""
            )
            print(f"longest {max(seconds):.2f} s ", end="")
        assert seconds


@pytest.fixture(scope="session")
def sass_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Disassembles a cubin. cuobjdump calls nvdisasm, which the wheels put beside it."""
    found = [folder / "nvidia" / "cu13" / "bin" for folder in map(Path, sys.path)]
    path = os.pathsep.join([*(str(folder) for folder in found if folder.is_dir()), os.environ["PATH"]])
    if not (tool := shutil.which("cuobjdump", path=path)) or not shutil.which("nvdisasm", path=path):
        pytest.skip("no cuobjdump and nvdisasm")

    def disassemble(cubin: str) -> str:
        environment = {**os.environ, "PATH": path}
        done = subprocess.run([tool, "-sass", cubin], env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    return disassemble


def instructions(sass: str) -> dict[str, int]:
    """How often each opcode occurs, without its modifiers."""
    counts: dict[str, int] = {}
    for opcode in re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass, re.MULTILINE):
        counts[opcode] = counts.get(opcode, 0) + 1
    return counts


def turns(p: Plan) -> tuple[int, int]:
    """How often the code has a consumer's turn: for a tile's first one, and in the loop over K and for the last one."""
    if p.swap_ab or p.depth > 1 or p.split > 1:
        return 0, 1
    last_apart = p.tile_m >= 64 and p.turn == 1 and p.tile_n // math.gcd(p.tile_n, 128) <= 7  # plan.cuh: kLastApart
    return 1, (1 if p.two_partials else 2) + last_apart


def wgmmas(p: Plan) -> int:
    """Of a consumer's turn: four a wave and block of K."""
    return 4 * p.waves * p.turn // p.slices


def wgmma_loop(sass: str, p: Plan) -> list[str]:
    """The loop over K and the last turn, from shortly before their first wgmma on. Before is a tile's first turn."""
    lines = [line for line in sass.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)]
    found = [i for i, line in enumerate(lines) if "QGMMA" in line]
    return lines[found[-turns(p)[1] * wgmmas(p)] - 20 : found[-1]]


def moved_to_wgmma(lines: list[str]) -> list[str]:
    """What moves a word to a uniform register in which a wgmma then finds it, in one of its descriptors' four."""
    found = []
    for i, line in enumerate(lines):
        if not (moved := re.search(r"R2UR UR(\d+)", line)):
            continue
        written = re.compile(rf"\*/\s+[A-Z][\w.]*\s+UR{moved[1]},")
        for later in lines[i + 1 :]:
            read = re.search(r"gdesc\[UR(\d+)\]", later)
            if read and 0 <= int(moved[1]) - int(read[1]) < 4:
                found.append(line)
                break
            if written.search(later):
                break
    return found


def test_a_moved_descriptor_is_found() -> None:
    move, other, wgmma = "/*00*/ R2UR UR10, R7 ;", "/*10*/ UMOV UR10, UR3 ;", "/*20*/ QGMMA R24, gdesc[UR8], R24 ;"
    assert moved_to_wgmma([move, wgmma]) == [move]
    assert moved_to_wgmma([move, other, wgmma]) == []
    assert moved_to_wgmma([move.replace("UR10", "UR12"), wgmma]) == []


def test_hardware_is_used(run: Run, sass_of: Any) -> None:
    """e4m3 on the tensor cores, tensors by TMA, and no local memory, in a kernel of each kind and shape of cluster."""
    wanted: dict[tuple[object, ...], Kernel] = {}
    for kernel in kernels():
        macros = dict(kernel.macros)
        if kernel.source == "gemm.cu":
            told_apart = ("KIND", "CLUSTER_M", "CLUSTER_N", "TILE_M", "DEPTH", "SPLIT", "SLICES", "SWAP_AB", "ONE_TILE")
            wanted[tuple(macros[name] for name in told_apart)] = kernel
        else:
            wanted[kernel.function, *macros.values()] = kernel
    paths = [run.builds[name(kernel)].path for kernel in wanted.values()]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        listings = list(pool.map(sass_of, paths))
    for kernel, sass in zip(wanted.values(), listings, strict=True):
        found = instructions(sass)
        assert sum(found.values()) > 50
        assert not {"LDL", "STL"} & set(found), f"{kernel} uses local memory"
        if kernel.source == "gemm.cu":
            macros = dict(kernel.macros)
            tile = macros["TILE_M"], macros["TILE_N"], macros["STAGES"]
            names = "depth", "split", "slices", "swap_ab"
            fields: dict[str, Any] = {field: macros[field.upper()] for field in names}
            p = Plan(*tile, **fields)
            assert found["QGMMA"] == sum(turns(p)) * wgmmas(p), kernel
            assert {"UTMALDG", "SYNCS"} <= set(found)
            assert ("UTMASTG" in found) == (p.staged and p.depth == 1)
            assert ("MULTICAST" in sass) == (macros["CLUSTER_M"] * macros["CLUSTER_N"] > 1)
            assert sass.index("UTMALDG") < sass.index("QGMMA"), f"{kernel}: the way to the first load is not laid first"
            if macros["ONE_TILE"] and p.depth > 1 and "MULTICAST" not in sass:  # with a loop over tiles 100 to 130
                ahead = sum(instructions(sass[: sass.index("UTMALDG")]).values())
                assert ahead < 96, f"{kernel}: {ahead} instructions ahead of the first load"
            loop = wgmma_loop(sass, p)
            assert not any(re.search(r"\bLDC\b", line) for line in loop), f"{kernel} waits for constants"
            moved = [line for line in loop if "R2UR" in line]
            # Of some kernels the ring's phase, once a turn, which no wgmma reads.
            assert len(moved) <= turns(p)[1], f"{kernel} moves its descriptors to uniform registers"
            assert not moved_to_wgmma(loop), f"{kernel} moves descriptors to uniform registers"
        else:
            assert "QGMMA" not in found


@pytest.mark.parametrize("tile", [(256, 128), (128, 192), (64, 64)], ids=str)
def test_promotion_has_its_rhythm(run: Run, tile: tuple[int, int]) -> None:
    """Of FMAs of one scale, one behind another, each fourth gives way, and the others keep the scale."""
    key = next(key for key in run.builds if key.startswith(f"gemm_{tile[0]}_{tile[1]}_"))
    cubin = Path(run.builds[key].path).read_bytes()
    ((offset, size),) = texts(cubin)
    words = [int.from_bytes(cubin[at : at + 16], "little") for at in range(offset, offset + size, 16)]
    scales = [word >> 32 & 0xFF if word & 0xFFF == 0x223 else None for word in words]
    runs = [list(some) for _, some in itertools.groupby(range(len(words)), key=scales.__getitem__)]
    long = [some for some in runs if scales[some[0]] is not None and len(some) >= 8]
    assert long
    in_rhythm = {
        (words[i] >> 109 & 1, words[i] >> 123 & 1) == ((0, 0) if place % 4 == 3 else (1, 1))
        for some in long
        for place, i in enumerate(some[:-1])  # the last one has nothing to keep its scale for
        if words[i] >> 105 & 15 == 1
    }
    assert in_rhythm == {True} if tile[0] >= 128 else False in in_rhythm


# ---- the compiler in this process


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The sources of this test, which it may change."""
    copy = dict(compiler.sources())
    monkeypatch.setattr(compiler, "sources", lambda: copy)
    return copy


@pytest.fixture(autouse=True)
def _fresh_choice() -> Iterator[None]:
    forget = compiler.compiler.cache_clear
    forget()
    yield
    forget()


KERNEL = Plan(64, 16, 2).kernel(native.DENSE)


def test_sources_are_all_there() -> None:
    folder = Path(__file__).parents[1] / "native" / "kernels"
    wanted = {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".cu", ".cuh", ".h")}
    assert compiler.sources() == wanted
    included = set(re.findall(r'#include "(.*?)"', "".join(wanted.values())))
    assert included <= set(wanted)
    assert not re.search(r"#include <", "".join(wanted.values())), "a header that NVRTC would have to find"


def test_source_error(sources: dict[str, str]) -> None:
    sources["gemm.cu"] += "\nint x = no_such_name;\n"
    with pytest.raises(CompileError, match="does not compile") as caught:
        compiler.build(KERNEL)
    assert 'identifier "no_such_name" is undefined' in caught.value.log
    assert caught.value.log.rstrip() in str(caught.value)
    assert "gemm.cu" in caught.value.log


def test_disagreement_over_shared_memory() -> None:
    """plan.py's size of shared memory is checked against the kernel's own."""
    macros = tuple((key, value + 1024 * (key == "SMEM_BYTES")) for key, value in KERNEL.macros)
    with pytest.raises(CompileError, match=r"plan\.py and SharedStorage disagree"):
        compiler.build(KERNEL._replace(macros=macros))


@pytest.mark.parametrize(
    "macros",
    [{"TILE_N": 208}, {"TILE_M": 256, "TILE_N": 144}, {"CLUSTER_M": 2, "CLUSTER_N": 2}, {"KIND": 1, "TILE_M": 256}],
    ids=repr,
)
def test_illegal_plans_do_not_compile(macros: dict[str, int]) -> None:
    """The rules of Plan.violations that a kernel can know, it asserts itself."""
    changed = tuple((dict(KERNEL.macros) | macros).items())
    with pytest.raises(CompileError, match="static assertion failed"):
        compiler.build(KERNEL._replace(macros=changed))


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) fp8gemm_gemm(float* p) {
    float v[256];
#pragma unroll
    for (int i = 0; i < 256; ++i) v[i] = p[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 256; ++i) p[(i * 37 % 256) * 1024 + threadIdx.x] = v[i] * v[255 - i];
}
"""


def test_spills_are_refused(sources: dict[str, str]) -> None:
    sources["gemm.cu"] = SPILLING
    with pytest.raises(CompileError, match=r"\d+ bytes of local memory") as caught:
        compiler.build(KERNEL)
    assert "spill stores" in caught.value.log


def test_a_stack_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    log = "160 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    monkeypatch.setattr(compiler, "_build_nvrtc", lambda kernel, arguments: (b"cubin", log))
    with pytest.raises(CompileError, match="160 bytes of local memory"):
        compiler.build(KERNEL)


@pytest.mark.parametrize(("code", "meaning"), [("C7510", "wgmma is serialised"), ("C7508", "setmaxnreg is ignored")])
def test_assembler_warnings_are_refused(code: str, meaning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = f"ptxas warning : (C{code[1:]}) Potential Performance Loss\n0 bytes spill stores, 0 bytes spill loads"
    monkeypatch.setattr(compiler, "_build_nvrtc", lambda kernel, arguments: (b"cubin", log))
    with pytest.raises(CompileError, match=meaning) as caught:
        compiler.build(KERNEL)
    assert caught.value.log == log


def test_a_build_tells_of_itself() -> None:
    built = compiler.build(reference_kernel(0))
    assert built.cubin[:4] == b"\x7fELF"
    assert built.spills == 0
    assert 16 <= built.registers <= 255
    assert built.seconds > 0
    assert "ptxas" in built.log


def test_cubin_is_built_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FP8GEMM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FP8GEMM_JIT_DEBUG", "1")
    kernel = copy_kernel()
    cubin = compiler.cubin(kernel)
    said = capfd.readouterr().err
    assert kernel.function in said
    assert "-arch=sm_90a" in said
    assert "ptxas" in said
    monkeypatch.setattr(compiler, "build", None)
    assert compiler.cubin(kernel) == cubin
    assert (tmp_path / "cubins" / f"{compiler.key(kernel)}.cubin").exists()
    assert capfd.readouterr().err == ""


# ---- keys


def test_key_depends_on_all_that_a_cubin_does(sources: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [compiler.key(KERNEL)]
    assert compiler.key(KERNEL) == keys[0]
    for index, (macro, value) in enumerate(KERNEL.macros):
        macros = (*KERNEL.macros[:index], (macro, value + 1), *KERNEL.macros[index + 1 :])
        keys.append(compiler.key(KERNEL._replace(macros=macros)))
    keys.append(compiler.key(KERNEL._replace(function="another")))
    keys.append(compiler.key(KERNEL._replace(source="reference.cu")))
    for file in [file for file in sources if file == "gemm.cu" or not file.endswith(".cu")]:
        saved, sources[file] = sources[file], sources[file] + " "
        keys.append(compiler.key(KERNEL))
        sources[file] = saved
    true = compiler.compiler()
    for other in (true._replace(version="13.999"), true._replace(kind="nvcc")):
        monkeypatch.setattr(compiler, "compiler", lambda other=other: other)
        keys.append(compiler.key(KERNEL))
    monkeypatch.setattr(compiler, "compiler", lambda: true)
    monkeypatch.setattr(compiler, "_OPTIONS", (*compiler._OPTIONS, "-O1"))
    keys.append(compiler.key(KERNEL))
    before = compiler.digest()
    monkeypatch.setattr(compiler, "_our_change", lambda: "another rhythm")
    keys.append(compiler.key(KERNEL))
    assert compiler.digest() != before
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[0-9a-f]{64}", key) for key in keys)


def test_key_does_not_depend_on_the_rest(sources: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on kernels that are not included, nor on where the compiler was found."""
    key = compiler.key(KERNEL)
    sources["quantize.cu"] += " "
    moved = compiler.compiler()._replace(origin="/elsewhere")
    monkeypatch.setattr(compiler, "compiler", lambda: moved)
    assert compiler.key(KERNEL) == key


# ---- nvcc


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch) -> str:
    path = shutil.which("nvcc", path=os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"]))
    if not path:
        pytest.skip("no nvcc")
    monkeypatch.setenv("FP8GEMM_COMPILER", path)
    return path


def test_nvcc_builds(nvcc: str) -> None:
    chosen = compiler.compiler()
    assert (chosen.kind, chosen.origin) == ("nvcc", nvcc)
    assert re.fullmatch(r"1[23]\.\d+\.\d+", chosen.version)
    assert chosen.major in (12, 13)
    for kernel in (Plan(128, 128, 5, 1, 2).kernel(native.DENSE), reference_kernel(3), cast_kernel(True, 0)):
        built = compiler.build(kernel)
        assert built.cubin[:4] == b"\x7fELF"
        assert built.spills == 0
        assert "0 bytes stack frame" in built.log


def test_nvcc_fails(nvcc: str, sources: dict[str, str]) -> None:
    sources["gemm.cu"] = "int x = no_such_name;\n"
    with pytest.raises(CompileError, match="failed") as caught:
        compiler.build(KERNEL)
    assert nvcc in str(caught.value)
    assert 'identifier "no_such_name" is undefined' in caught.value.log


def test_names_are_distinct() -> None:
    assert len({name(kernel) for kernel in kernels()}) == len(kernels())
    assert {kernel.source for kernel in kernels()} == {"gemm.cu", "reference.cu", "quantize.cu"}
    assert KINDS[native.MASKED] == "masked"


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
