"""What imports what, what `import fp8gemm` does not do, and that Python and C agree on every struct."""

import ast
import ctypes
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

import fp8gemm
from fp8gemm import native

PACKAGE = Path(fp8gemm.__file__).parent
ROOT = PACKAGE.parent
# Each module imports only from lines above its own.
LAYERS = [
    ["errors"],
    ["native"],
    ["dlpack", "device"],
    ["problem"],
    ["plan"],
    ["cost", "cache", "sass"],
    ["compiler"],
    ["backends"],
    ["store"],
    ["planner"],
    ["live"],
    ["layout"],
    ["gemm", "quantize"],
    ["__init__"],
]
# What the command line is made of: above the library, which knows nothing of it.
COMMANDS = {path.stem for path in PACKAGE.glob("*.py")} - {name for layer in LAYERS for name in layer}
LIBRARY = [name for layer in LAYERS for name in layer]
MODULES = sorted(PACKAGE.glob("*.py"))
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
BUILTINS = set(sys.stdlib_module_names)


def imports(tree: ast.AST, top_level_only: bool = False) -> Iterator[tuple[str, str]]:
    """(where from, name) of each import; '.' stands for the package."""
    nodes = tree.body if top_level_only and isinstance(tree, ast.Module) else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], alias.name
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 0 and module.partition(".")[0] != "fp8gemm":
                yield module.partition(".")[0], module
                continue
            inner = module.removeprefix("fp8gemm").lstrip(".")
            for alias in node.names:
                yield ".", (inner or alias.name).partition(".")[0]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def test_layers_name_every_module_once() -> None:
    assert len(set(LIBRARY)) == len(LIBRARY)
    assert set(LIBRARY) <= {path.stem for path in MODULES}


@pytest.mark.parametrize("name", LIBRARY)
def test_imports_run_one_way(name: str) -> None:
    (own,) = (i for i, layer in enumerate(LAYERS) if name in layer)
    above = {other for layer in LAYERS[:own] for other in layer}
    for origin, module in imports(parsed(PACKAGE / f"{name}.py")):
        assert origin != "." or module in above, f"{name} imports {module}"


def test_commands_do_not_import_in_circles() -> None:
    needs = {
        name: {module for origin, module in imports(parsed(PACKAGE / f"{name}.py")) if origin == "."}
        & COMMANDS - {name}
        for name in COMMANDS
    }
    while ready := {name for name, others in needs.items() if not others}:
        needs = {name: others - ready for name, others in needs.items() if name not in ready}
    assert not needs, f"a circle among {sorted(needs)}"


# The tuner's own order; it imports the library and, for what is shown, the command line's modules, never the other way.
TUNER = [
    ["__init__"],
    ["writer", "presets", "space", "measure", "operands", "build", "nvml"],
    ["target", "cpu", "gpu"],
    ["sweep"],
    ["tune", "daemon", "warmup", "report"],
    ["report_html"],
]
TUNER_MODULES = sorted((ROOT / "tuner").glob("*.py"))


def test_the_tuner_imports_one_way() -> None:
    layers = {name: i for i, layer in enumerate(TUNER) for name in layer}
    assert set(layers) == {path.stem for path in TUNER_MODULES}
    for path in TUNER_MODULES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ImportFrom) and node.level:
                for name in [node.module] if node.module else [alias.name for alias in node.names]:
                    in_function = node.col_offset > 0  # target opens what implements it
                    assert in_function or layers[name] <= layers[path.stem], f"{path.stem} imports {name}"
            assert not isinstance(node, ast.Assert), f"{path.name}: assert is for tests"


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_knows_no_tuner(name: str) -> None:
    assert not {module for origin, module in imports(parsed(PACKAGE / f"{name}.py")) if module == "tuner"}


@each_module
def test_outside_packages(path: Path) -> None:
    """The library needs platformdirs; NumPy and cuda-python only where they are used."""
    found = {origin for origin, _ in imports(parsed(path), top_level_only=True)} - BUILTINS - {"."}
    if path.stem in LIBRARY:
        assert found <= {"platformdirs"}
    later = {origin for origin, _ in imports(parsed(path))} - BUILTINS - {"."}
    assert path.stem not in LIBRARY or later <= {"platformdirs", "numpy", "cuda"}


@each_module
def test_style_that_hides_errors(path: Path) -> None:
    """No assert, which -O removes; no except that catches everything unnamed; no framework."""
    tree = parsed(path)
    for node in ast.walk(tree):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: assert is for tests"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{where}: a bare except"
    if path.stem in LIBRARY:
        assert not {origin for origin, _ in imports(tree)} & {"torch", "jax", "cupy", "numba", "triton"}
    assert "torch" not in {origin for origin, _ in imports(tree, top_level_only=True)}


def test_all_is_what_there_is() -> None:
    assert fp8gemm.__all__ == sorted(fp8gemm.__all__)
    tree = parsed(PACKAGE / "__init__.py")
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(fp8gemm.__all__) == imported
    for name in fp8gemm.__all__:
        assert getattr(fp8gemm, name).__doc__, f"{name} has no documentation"


def python(code: str) -> str:
    """What a fresh interpreter prints, without this one's site customisations."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    """Nothing heavy comes along, and no library is opened."""
    code = """
import sys
import fp8gemm
from fp8gemm import native
print(native.library.cache_info().currsize, *sorted({name.partition('.')[0] for name in sys.modules}))
print(*{line.split()[-1] for line in open('/proc/self/maps') if '.so' in line})
"""
    modules, libraries = python(code).splitlines()
    opened, *names = modules.split()
    assert opened == "0"
    assert not set(names) & {
        "torch",
        "jax",
        "cupy",
        "numba",
        "typer",
        "click",
        "rich",
        "sqlite_utils",
        "sqlite3",
        "cuda",
    }
    for text in ("libfp8gemm", "libcuda", "nvrtc"):
        assert text not in libraries


def test_a_call_on_the_cpu_opens_only_our_library() -> None:
    code = """
import numpy as np, sys, fp8gemm
fp8gemm.gemm_fp8_fp8_bf16_nt(*[(np.zeros((3, 16), np.uint8), np.ones((rows, 1), np.float32)) for rows in (3, 1)])
maps = open('/proc/self/maps').read()
print('libfp8gemm' in maps, 'libcuda' in maps, 'nvrtc' in maps, 'cuda' in sys.modules)
"""
    assert python(code).split() == ["True", "False", "False", "False"]


def test_import_time(capsys: pytest.CaptureFixture[str]) -> None:
    """Told, not judged: below 100 ms beyond NumPy."""
    code = "import numpy, time; t = time.perf_counter(); import fp8gemm; print(1000 * (time.perf_counter() - t))"
    times = sorted(float(python(code)) for _ in range(3))
    with capsys.disabled():
        print(f"\nimport fp8gemm: {times[1]:.0f} ms beyond NumPy ", end="")


def test_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert '"py.typed"' in (ROOT / "setup.py").read_text()


STRUCTS: dict[str, type[ctypes.Structure]] = {
    "tensor": native.Tensor,
    "operands": native.Operands,
    "problem": native.Problem,
    "plan": native.Plan,
    "cpu_plan": native.CpuPlan,
    "key": native.Key,
    "entry": native.Entry,
    "device": native.Device,
    "error": native._Error,
}


def field_names(struct: type[ctypes.Structure]) -> list[str]:
    return [field[0] for field in struct._fields_]


def test_structs_agree_with_c(tmp_path: Path) -> None:
    """Size of each, and place and size of every field."""
    lines = ["#include <cstdio>", "#include <cstddef>", '#include "fp8gemm.h"', "int main() {"]
    expected = []
    for name, struct in STRUCTS.items():
        lines.append(f'printf("%zu\\n", sizeof(fp8gemm_{name}));')
        expected.append(str(ctypes.sizeof(struct)))
        for field in field_names(struct):
            place = f"offsetof(fp8gemm_{name}, {field}), sizeof(fp8gemm_{name}::{field})"
            lines.append(f'printf("%zu %zu\\n", {place});')
            at = getattr(struct, field)
            expected.append(f"{at.offset} {at.size}")
    source, program = tmp_path / "sizes.cpp", tmp_path / "sizes"
    source.write_text("\n".join([*lines, 'printf("%d\\n", FP8GEMM_ABI_VERSION);', "}"]))
    subprocess.run(["g++", f"-I{ROOT / 'native' / 'host'}", source, "-o", program], check=True)
    found = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    assert found == [*expected, str(native.ABI_VERSION)]


def test_every_function_of_the_interface_is_bound() -> None:
    header = (ROOT / "native" / "host" / "fp8gemm.h").read_text()
    declared = {text.split("(")[0].split()[-1].lstrip("*") for text in header.split("FP8GEMM_API ")[2:]}
    bound = {
        f"fp8gemm_{name}" for name in (*native._SIGNATURES, *native._WITH_GIL, *native._PLAIN, *native._WITH_GIL_PLAIN)
    }
    assert declared - bound == {"fp8gemm_dlpack_delete", "fp8gemm_capsule_delete"}  # by address
    assert bound <= declared


def test_kinds_and_devices_agree_with_c() -> None:
    header = (ROOT / "native" / "host" / "fp8gemm.h").read_text()
    for name, value in (("DENSE", native.DENSE), ("CONTIGUOUS", native.CONTIGUOUS), ("RAGGED", native.RAGGED)):
        assert f"FP8GEMM_{name} = {value}" in header
    assert f"FP8GEMM_MASKED = {native.MASKED}" in header


def test_another_abi_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    with pytest.raises(ImportError, match=r"has ABI version .* reinstall fp8gemm"):
        native.Library(PACKAGE / "libfp8gemm.so")


def test_a_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    with pytest.raises(ImportError, match=r"libfp8gemm\.so is missing; build it with `make native`"):
        native.library.__wrapped__()


def test_the_library_links_to_neither_cuda_nor_python() -> None:
    """So that one file fits every driver and interpreter."""
    needed = subprocess.run(["ldd", PACKAGE / "libfp8gemm.so"], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in needed
    assert f"libpython{sysconfig.get_python_version()}" not in needed
