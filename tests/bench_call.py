"""What a call costs on the host up to its launch: `python tests/bench_call.py`, on a stub of the driver, without a GPU.

The stub's own work (it copies 700 bytes a launch) counts. A real driver adds its three tensor maps and its launch.
"""

import os
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path

import stub

import fp8gemm
from fp8gemm import gemm, native


def nanoseconds(call: Callable[[], object]) -> float:
    """The least of some rounds."""
    return min(timeit.repeat(call, number=500, repeat=40)) / 500 * 1e9


def calls() -> dict[str, Callable[[], object]]:
    n, k, g = 2112, 7168, 4
    lhs = stub.Tensor((64, k), stub.E4M3), stub.Tensor((64, k // 128), stub.F32)
    rhs = stub.Tensor((n, k), stub.E4M3), stub.Tensor((17, k // 128), stub.F32)
    d = stub.Tensor((64, n), stub.BF16)
    lhs3 = stub.Tensor((g, 64, k), stub.E4M3), stub.Tensor((g, 64, k // 128), stub.F32)
    rhs3 = stub.Tensor((g, n, k), stub.E4M3), stub.Tensor((g, 17, k // 128), stub.F32)
    d3, counts = stub.Tensor((g, 64, n), stub.BF16), stub.Tensor((g,), stub.I32)
    return {
        "a Python function of no arguments": lambda: None,
        "dense": lambda: fp8gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs, d),
        "dense, stream given": lambda: fp8gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs, d, stream=5),
        "masked": lambda: fp8gemm.m_grouped_gemm_fp8_fp8_bf16_nt_masked(lhs3, rhs3, d3, counts, 32),
        "dense, the long way": lambda: gemm._call(native.DENSE, lhs, rhs, d, None, None, None, 0, False),
    }


def report() -> None:
    for name, call in calls().items():
        call()
        print(f"{nanoseconds(call):8.0f} ns  {name}")


if __name__ == "__main__":
    if "STUBS" in os.environ:
        report()
    else:
        with tempfile.TemporaryDirectory() as folder:
            stub.build(Path(folder))
            sys.exit(subprocess.run([sys.executable, __file__], env=stub.environment(Path(folder))).returncode)
