"""Everything the library raises.

Fp8GemmError
├── OperandError (ValueError)       a tensor or argument of a call; names it, its value and the limit
│   ├── DTypeError (TypeError)      wrong element type
│   ├── ShapeError                  wrong rank or shape
│   ├── LayoutError                 strides, alignment, read-only, overlap
│   └── DeviceError                 operands on different or unsupported devices
├── BackendUnavailable (RuntimeError)   no Hopper GPU, driver or compiler for CUDA tensors
├── CompileError (RuntimeError)     NVRTC or nvcc failed; carries the log
│   └── CompilerNotFound            there is no compiler
├── DriverError (RuntimeError)      a CUDA driver call failed
├── NotPrepared (RuntimeError)      a call would have to compile, load or allocate where it must not
├── PlanError (ValueError)          an illegal plan
└── StoreError (RuntimeError)       the store of plans cannot be read or written; calls go on without it
"""


class Fp8GemmError(Exception):
    """Base of every error of this library."""


class OperandError(Fp8GemmError, ValueError):
    """A bad argument. `argument` is its name in the signature; of a pair, the tensor's: a, sa, b, sb, q or s."""

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument}: {problem}" if argument else problem)
        self.argument = argument


class DTypeError(OperandError, TypeError):
    """A tensor with the wrong element type."""


class ShapeError(OperandError):
    """A tensor with the wrong rank or shape."""


class LayoutError(OperandError):
    """Strides, alignment, a read-only output, or memory that overlaps."""


class DeviceError(OperandError):
    """Tensors on different devices, or on a kind of device that is not supported."""


class BackendUnavailable(Fp8GemmError, RuntimeError):
    """CUDA tensors that cannot run here; the message says why."""


class CompileError(Fp8GemmError, RuntimeError):
    """The kernel compiler failed, or built something that must not be used (spills). `log` is its output."""

    def __init__(self, problem: str, log: str = "") -> None:
        super().__init__(f"{problem}\n{log}".rstrip())
        self.log = log


class CompilerNotFound(CompileError):
    """Neither NVRTC nor the nvcc that FP8GEMM_COMPILER names can be used."""


class DriverError(Fp8GemmError, RuntimeError):
    """A CUDA driver call failed, with the driver's own words."""


class NotPrepared(Fp8GemmError, RuntimeError):
    """A call would have to compile, load or allocate, where it must not (a stream capture, FP8GEMM_STRICT=1)."""


class PlanError(Fp8GemmError, ValueError):
    """A plan that breaks a rule of `fp8gemm.plan.Plan.violations`."""


class StoreError(Fp8GemmError, RuntimeError):
    """The store of plans cannot be read or written. Only the tuner and the command line raise it."""
