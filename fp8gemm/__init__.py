"""FP8 GEMMs with fine-grained scales for NVIDIA Hopper, for any Python framework."""

from .device import get_num_sms, set_num_sms
from .dlpack import Tensor
from .errors import (
    BackendUnavailable,
    CompileError,
    CompilerNotFound,
    DeviceError,
    DriverError,
    DTypeError,
    Fp8GemmError,
    LayoutError,
    NotPrepared,
    OperandError,
    PlanError,
    ShapeError,
    StoreError,
)
from .gemm import (
    gemm_fp8_fp8_bf16_nt,
    m_grouped_gemm_fp8_fp8_bf16_nt_contiguous,
    m_grouped_gemm_fp8_fp8_bf16_nt_masked,
)
from .layout import (
    ceil_div,
    get_col_major_tma_aligned_tensor,
    get_m_alignment_for_contiguous_layout,
    get_tma_aligned_size,
)
from .live import refresh
from .planner import Prepared, Shapes, get_batch_invariant, prepare, set_batch_invariant
from .quantize import per_block_cast_to_fp8, per_token_cast_to_fp8

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "CompileError",
    "CompilerNotFound",
    "DTypeError",
    "DeviceError",
    "DriverError",
    "Fp8GemmError",
    "LayoutError",
    "NotPrepared",
    "OperandError",
    "PlanError",
    "Prepared",
    "ShapeError",
    "Shapes",
    "StoreError",
    "Tensor",
    "ceil_div",
    "gemm_fp8_fp8_bf16_nt",
    "get_batch_invariant",
    "get_col_major_tma_aligned_tensor",
    "get_m_alignment_for_contiguous_layout",
    "get_num_sms",
    "get_tma_aligned_size",
    "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous",
    "m_grouped_gemm_fp8_fp8_bf16_nt_masked",
    "per_block_cast_to_fp8",
    "per_token_cast_to_fp8",
    "prepare",
    "refresh",
    "set_batch_invariant",
    "set_num_sms",
]
