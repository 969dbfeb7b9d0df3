"""What a user would call instead: the GEMMs that the benchmark times beside ours, on the same operands."""

import importlib
from collections.abc import Callable
from typing import Any

from . import backends, native, planner
from .accuracy import BLOCK, dequantise, e4m3_values, to_bf16
from .dlpack import call_stream, cuda_device, read
from .layout import ceil_div
from .problem import describe

Call = Callable[[], object]
Peers = dict[str, Call]

DEFAULT = "default"

DESCRIPTIONS = {
    DEFAULT: "fp8gemm by the plan that the cost model picks, where the store has another one",
    "numpy": "both operands dequantised by a look-up table, float32 @, rounded to bf16",
    "numpy_f32": "float32 @ alone, of operands dequantised beforehand (4x the memory)",
    "cublaslt_block": "the same block scales, M a multiple of 4 (torch.nn.functional.scaled_mm)",
    "cublaslt_tensor": "FP8 with one scale per tensor, so for time only (torch._scaled_mm)",
    "deep_gemm": "the same scales (deep_gemm.fp8_gemm_nt)",
}


def default_plan(lhs: Any, rhs: Any, d: Any) -> Peers:
    """This library's dense GEMM by the cost model's plan, if the store has another one. Operands as in a call."""
    device_id = cuda_device(d)
    stream = call_stream(None, d, device_id)
    operands = native.Operands(kind=native.DENSE)
    operands.layout.ndim = -1
    tensors = dict(zip(("a", "sa", "b", "sb", "d"), (*lhs, *rhs, d), strict=True))
    imported = {name: read(tensor, name, stream) for name, tensor in tensors.items()}
    for name, tensor in imported.items():
        setattr(operands, name, tensor.tensor)
    found = describe(operands)
    key = planner.make_key(found)
    device = planner.device_of(key)
    plan = planner.default_plan(planner.problem_of(key), device, key.num_sms or device.sms)
    if key.reference or planner.stored(key, device) in (None, plan):
        return {}
    entry = planner.entry_of(key, plan, stream=stream)

    def call() -> object:
        backends.run(entry, operands, found, stream)
        return imported  # which keeps the operands

    return {DEFAULT: call}


def numpy_peers(lhs: Any, rhs: Any) -> Peers:
    """lhs: q (M, K) uint8, s (M, ceil(K / 128)); rhs: q (N, K), s (ceil(N / 128), ceil(K / 128))."""
    import numpy as np

    values = e4m3_values(np, np.float32)
    a, b = dequantise(np, lhs, 1, values), dequantise(np, rhs, BLOCK, values)

    def dequantise_and_multiply() -> object:
        x, w = dequantise(np, lhs, 1, values), dequantise(np, rhs, BLOCK, values)
        return to_bf16(np, x @ w.T)

    return {"numpy": dequantise_and_multiply, "numpy_f32": lambda: a @ b.T}


def torch_peers(lhs: Any, rhs: Any, d: Any, left_out: dict[str, str]) -> Peers:
    """Those that are installed and run on operands as in `numpy_peers`, on a GPU, A's scales column-major.

    The others go to `left_out`, with the reason.
    """
    import torch

    peers: Peers = {}
    for name, make in (("cublaslt_block", _block), ("cublaslt_tensor", _tensor), ("deep_gemm", _deep_gemm)):
        try:
            if (call := make(lhs, rhs, d)) is not None:
                call()
                torch.cuda.synchronize()
                peers[name] = call
        except Exception as error:  # other people's code: whatever it raises, the benchmark goes on without it
            left_out.setdefault(name, f"{type(error).__name__}: {error}".splitlines()[0][:200])
    return peers


def _block(lhs: Any, rhs: Any, d: Any) -> Call | None:
    import torch
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

    if d.shape[0] % 4:
        return None  # cuBLASLt refuses it
    (a, sa), (b, sb), plain = lhs, rhs, SwizzleType.NO_SWIZZLE
    a, b, k_blocks = a.view(torch.float8_e4m3fn), b.view(torch.float8_e4m3fn), sb.shape[1]
    padded = torch.zeros(sb.shape[0], ceil_div(k_blocks, 4) * 4, device=sb.device)
    padded[:, :k_blocks] = sb
    scales = padded[:, :k_blocks].t()
    recipes = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    return lambda: scaled_mm(
        a, b.t(), sa, recipes[0], scales, recipes[1], swizzle_a=plain, swizzle_b=plain, output_dtype=torch.bfloat16
    )


def _tensor(lhs: Any, rhs: Any, d: Any) -> Call:
    import torch

    a, b = lhs[0].view(torch.float8_e4m3fn), rhs[0].view(torch.float8_e4m3fn)
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _deep_gemm(lhs: Any, rhs: Any, d: Any) -> Call:
    import torch

    deep_gemm: Any = importlib.import_module("deep_gemm")
    multiply = getattr(deep_gemm, "fp8_gemm_nt", None) or deep_gemm.gemm_fp8_fp8_bf16_nt
    pairs = [(q.view(torch.float8_e4m3fn), s) for q, s in (lhs, rhs)]
    return lambda: multiply(*pairs, d)
