"""How fp8gemm is built: one g++ call, no CUDA, no Python headers. Everything else: pyproject.toml."""

import os
import shlex
import subprocess
import sys
from glob import glob

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

SOURCES = sorted(glob("native/host/*.cpp"))
HEADERS = sorted(glob("native/host/*.h") + glob("native/kernels/*.h"))
FLAGS = "native/host/flags"  # g++ reads its options from there; the Makefile names the same file
LIBRARY = "fp8gemm/libfp8gemm.so"


class BuildLibrary(build_ext):
    """Builds libfp8gemm.so, which ctypes loads: no extension module, so one file fits every Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def run(self) -> None:
        if self.inplace and not newer_group([*SOURCES, *HEADERS, FLAGS], LIBRARY):
            return  # `make native` has just built it
        super().run()

    def build_extension(self, ext: Extension) -> None:
        library = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(library), exist_ok=True)
        cxx, cxxflags, ldflags = (
            shlex.split(os.environ.get(name, default))
            for name, default in [("CXX", "g++"), ("CXXFLAGS", ""), ("LDFLAGS", "")]
        )
        command = [*cxx, *ext.sources, f"@{FLAGS}", *cxxflags, *ldflags, "-o", library]
        print(shlex.join(command), flush=True)
        if subprocess.run(command).returncode:
            sys.exit(f"{cxx[0]} could not build {LIBRARY}: see above")


class TagWheel(bdist_wheel):
    """Any Python 3, this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=sorted({"fp8gemm.kernels", "fp8gemm.tuner", *find_packages(include=["fp8gemm", "fp8gemm.*"])}),
    package_dir={"fp8gemm.kernels": "native/kernels", "fp8gemm.tuner": "tuner"},
    package_data={
        "fp8gemm": ["py.typed"],
        "fp8gemm.kernels": ["*.cu", "*.cuh", "*.h"],
        "fp8gemm.tuner": ["*.toml"],
    },
    ext_modules=[Extension("fp8gemm.libfp8gemm", SOURCES, depends=[*HEADERS, FLAGS])],
    cmdclass={"bdist_wheel": TagWheel, "build_ext": BuildLibrary},
)
