"""What our tensors ask of the CUDA driver, told by a stub of it: a stream of others is used only when it is named."""

import subprocess
import sys
from pathlib import Path

from stub import environment

OWN, CALLERS, DEFAULT, OTHER, CAPTURING = "0x77", "0x55", "0x1", "0x99", "0xca"


def calls(stub: Path, code: str) -> list[str]:
    """What the driver hears while a new process runs the code, to which `tensor` and `f` are known."""
    prelude = "from fp8gemm import dlpack as f\ntensor = f.Tensor((5, 8), f.BF16, (2, 0), 0x55)\n"
    command = [sys.executable, "-c", prelude + code]
    done = subprocess.run(command, env=environment(stub), capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


ALLOCATED = [f"allocate 80 on {OWN}", f"record on {OWN}", f"wait on {CALLERS}"]


def test_a_stream_is_not_used_after_its_call(stub: Path) -> None:
    """The stream may be gone when the memory is freed."""
    assert calls(stub, "tensor.written(0x55)\ndel tensor") == [
        *ALLOCATED,
        f"record on {CALLERS}",
        f"wait on {OWN}",
        f"free on {OWN}",
    ]


def test_readers_wait_for_the_writer_and_the_default_stream_is_waited_for(stub: Path) -> None:
    code = "tensor.written(0x55)\ncapsule = tensor.__dlpack__(stream={})\ndel tensor\ndel capsule"
    written = [*ALLOCATED, f"record on {CALLERS}"]
    freed = [f"wait on {OWN}", f"free on {OWN}"]
    assert calls(stub, code.format(OTHER)) == [*written, f"wait on {OTHER}", *freed]
    by_default = [f"wait on {OWN}", f"record on {DEFAULT}", *freed]
    assert calls(stub, code.format(DEFAULT)) == [*written, f"wait on {DEFAULT}", *by_default]
    assert calls(stub, code.format(-1)) == [*written, *freed]


def test_events_do_not_cross_the_border_of_a_capture(stub: Path) -> None:
    code = f"tensor.written({CAPTURING})\ncapsule = tensor.__dlpack__(stream={CAPTURING})\ndel capsule, tensor"
    assert calls(stub, code) == [*ALLOCATED, f"wait on {OWN}", f"free on {OWN}"]


def test_no_allocation_in_a_capture(stub: Path) -> None:
    code = f"""
import fp8gemm
try:
    f.Tensor((5, 8), f.BF16, (2, 0), {CAPTURING})
except fp8gemm.NotPrepared as error:
    assert "pass d" in str(error)
else:
    raise SystemExit("no error")
del tensor
"""
    assert calls(stub, code) == [*ALLOCATED, f"wait on {OWN}", f"free on {OWN}"]
