"""What a call costs on the host: `python tests/bench_call.py`.

Without a GPU, on a stub of the driver: nanoseconds up to the launch, with the stub's own work (it copies 700 bytes a
launch). On a Hopper machine also microseconds of the whole call from PyTorch, CuPy, JAX and from tensors that have
`__dlpack__` alone, whichever are installed; and of that what the framework takes to export its tensors.
"""

import functools
import importlib
import os
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import stub

import fp8gemm
from fp8gemm import device, gemm, native

M, N, K, GROUPS = 64, 2112, 7168, 4
KB, NB = K // 128, -(-N // 128)
Call = Callable[[], object]


def best(call: Call, rounds: int, number: int, synchronize: Call = lambda: None) -> float:
    """Seconds of a call, in the best of some rounds, each of which begins with an idle device."""
    seconds = []
    call()
    for _ in range(rounds):
        synchronize()
        seconds.append(timeit.timeit(call, number=number) / number)
    synchronize()
    return min(seconds)


def on_the_stub() -> None:
    lhs, rhs = (
        (stub.Tensor((rows, K), stub.E4M3), stub.Tensor((scales, KB), stub.F32)) for rows, scales in ((M, M), (N, NB))
    )
    lhs3, rhs3 = (
        (stub.Tensor((GROUPS, rows, K), stub.E4M3), stub.Tensor((GROUPS, scales, KB), stub.F32))
        for rows, scales in ((M, M), (N, NB))
    )
    d, d3 = stub.Tensor((M, N), stub.BF16), stub.Tensor((GROUPS, M, N), stub.BF16)
    counts = stub.Tensor((GROUPS,), stub.I32)
    calls: dict[str, Call] = {
        "a Python function of no arguments": lambda: None,
        "dense": lambda: fp8gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs, d),
        "dense, stream given": lambda: fp8gemm.gemm_fp8_fp8_bf16_nt(lhs, rhs, d, stream=5),
        "masked": lambda: fp8gemm.m_grouped_gemm_fp8_fp8_bf16_nt_masked(lhs3, rhs3, d3, counts, 32),
        "dense, the long way": lambda: gemm._call(native.DENSE, lhs, rhs, d, None, None, None, 0, False),
    }
    for name, call in calls.items():
        print(f"{best(call, 40, 500) * 1e9:8.0f} ns  {name}")


class OnlyDlpack:
    """A tensor of whose type nothing is known but that it has `__dlpack__`."""

    def __init__(self, tensor: Any) -> None:
        self.__dlpack__, self.__dlpack_device__ = tensor.__dlpack__, tensor.__dlpack_device__


def on_a_gpu() -> None:
    for name in ("torch", "cupy", "jax"):
        try:
            xp = importlib.import_module(name)
        except ImportError:
            print(f"             {name}: not installed")
            continue
        make = {"torch": torch_operands, "cupy": cupy_operands, "jax": jax_operands}[name]
        for words, tensors, synchronize in make(xp):
            whole = best(functools.partial(multiply, *tensors), 15, 70, synchronize)
            share = "read by the exchange API"
            if words != "torch":
                seconds = best(functools.partial(export, *tensors), 15, 70, synchronize)
                share = f"{seconds * 1e6:.2f} us of it {name}'s __dlpack__"
            print(f"{whole * 1e6:8.2f} us  {words}: {share}")


def multiply(a: Any, sa: Any, b: Any, sb: Any, d: Any) -> None:
    fp8gemm.gemm_fp8_fp8_bf16_nt((a, sa), (b, sb), d)


def export(*tensors: Any) -> None:
    for x in tensors:
        if x is not None:
            x.__dlpack__(stream=1)


Operands = list[tuple[str, tuple[Any, ...], Call]]


def torch_operands(torch: Any) -> Operands:
    a, b = (torch.zeros(rows, K, device="cuda", dtype=torch.uint8) for rows in (M, N))
    sa, sb = (torch.ones(rows, KB, device="cuda") for rows in (M, NB))
    tensors = a, sa, b, sb, torch.empty(M, N, device="cuda", dtype=torch.bfloat16)
    only = tuple(map(OnlyDlpack, tensors))
    return [
        ("torch", tensors, torch.cuda.synchronize),
        ("__dlpack__ alone, of torch's tensors", only, torch.cuda.synchronize),
    ]


def cupy_operands(cupy: Any) -> Operands:
    a, b = (cupy.zeros((rows, K), cupy.uint8) for rows in (M, N))
    sa, sb = (cupy.ones((rows, KB), cupy.float32) for rows in (M, NB))
    tensors = a, sa, b, sb, cupy.empty((M, N), cupy.uint16)
    return [("cupy", tensors, cupy.cuda.get_current_stream().synchronize)]


def jax_operands(jax: Any) -> Operands:
    numpy: Any = jax.numpy
    a, b = (numpy.zeros((rows, K), numpy.uint8) for rows in (M, N))
    sa, sb = (numpy.ones((rows, KB), numpy.float32) for rows in (M, NB))

    def synchronize() -> None:
        jax.block_until_ready((a, sa, b, sb))
        time.sleep(0.02)  # our own work is on a stream that JAX does not know

    return [("jax, d=None", (a, sa, b, sb, None), synchronize)]


if __name__ == "__main__":
    if "STUBS" in os.environ:
        on_the_stub()
    else:
        with tempfile.TemporaryDirectory() as folder:
            stub.build(Path(folder))
            subprocess.run([sys.executable, __file__], env=stub.environment(Path(folder)), check=True)
        if device.hopper_devices():
            on_a_gpu()
