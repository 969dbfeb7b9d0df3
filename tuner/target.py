"""What is tuned for: a device of this machine, what measurements on it depend on, and how plans get ready there."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

from fp8gemm import backends, device, native
from fp8gemm.device import Device
from fp8gemm.store import AnyPlan, Task

from .measure import Rig, Stop
from .writer import Stamp

Say = Callable[[str], None]  # takes a line of progress


class Target(Protocol):
    """A device."""

    name: str  # "cpu" or "cuda:0"
    lock_name: str  # the same device has the same one in every process
    device: Device
    stamp: Stamp

    def rig(self, task: Task) -> Rig:
        """The problem's operands on this device. Raises Fp8GemmError if there is no room."""

    def announce(self, plans: Sequence[tuple[AnyPlan, Task]]) -> None:
        """Says which plans `build` will be asked for, so that compiling may begin while others are measured."""

    def build(self, plans: Sequence[AnyPlan], task: Task, stop: Stop, say: Say) -> dict[AnyPlan, str]:
        """Compiles what the plans need into the cache. Those that cannot be built, and why."""

    def is_idle(self) -> bool:
        """Whether nobody else uses the device."""

    def check(self) -> None:
        """Raises DriverError if this process cannot use the device any more, as after a kernel that crashed."""

    def close(self) -> None: ...


class CpuTarget:
    """This machine's CPU: nothing to compile."""

    name = lock_name = "cpu"

    def __init__(self) -> None:
        self.device = backends.cpu_device()
        self.stamp = Stamp("", "", library_digest())

    def rig(self, task: Task) -> Rig:
        from .cpu import CpuRig

        return CpuRig(task)

    def announce(self, plans: Sequence[tuple[AnyPlan, Task]]) -> None: ...

    def build(self, plans: Sequence[AnyPlan], task: Task, stop: Stop, say: Say) -> dict[AnyPlan, str]:
        return {}

    def is_idle(self) -> bool:
        from fp8gemm.workbench import busy_share

        return busy_share() < 0.2

    def check(self) -> None: ...

    def close(self) -> None: ...


@functools.cache
def library_digest() -> str:
    """Of libfp8gemm.so, which holds the CPU's kernels."""
    native.library()
    file = native.__file__.replace("native.py", "libfp8gemm.so")
    with open(file, "rb") as library:
        return hashlib.file_digest(library, "sha256").hexdigest()[:16]


def open_target(where: str | None, share: bool = False, memory_bytes: int | None = None) -> Target:
    """ "cpu", "cuda:1", or the best there is. Raises BackendUnavailable for a GPU that cannot serve."""
    where = where or device.best_device()
    if where == "cpu":
        return CpuTarget()
    from .gpu import GpuTarget

    return GpuTarget(int(where.removeprefix("cuda:")), share, memory_bytes)
