"""What a CUDA device is, and how many of its SMs the library may use."""

import ctypes
import functools
import platform
from pathlib import Path
from typing import NamedTuple

from . import native
from .errors import BackendUnavailable, Fp8GemmError, OperandError


class Device(NamedTuple):
    """The properties that plans depend on. Rates are what the device reports, not what a GEMM reaches."""

    name: str
    capability: tuple[int, int]
    sms: int
    l2_bytes: int
    shared_bytes: int  # most shared memory of one CTA
    clock_hz: float
    memory_bandwidth: float  # bytes per second; 0 if the driver does not tell

    @property
    def is_cpu(self) -> bool:
        """Whether it stands for this machine's CPU (`backends.cpu_device`): its SMs are cores then."""
        return self.capability == (0, 0)


@functools.cache
def read_device(device_id: int) -> Device:
    """Properties of a CUDA device. Raises BackendUnavailable without a driver, DriverError for an unknown device."""
    raw = native.Device()
    native.library().device_read(device_id, ctypes.byref(raw))
    name, clock_hz = raw.name.decode(), raw.clock_khz * 1e3
    capability = raw.major, raw.minor
    return Device(name, capability, raw.sms, raw.l2_bytes, raw.shared_bytes, clock_hz, raw.memory_bandwidth)


def require_hopper(device_id: int) -> Device:
    """The device, if it is a Hopper (compute capability 9.0); raises BackendUnavailable if not."""
    device = read_device(device_id)
    if device.capability != (9, 0):
        major, minor = device.capability
        raise BackendUnavailable(
            f"cuda:{device_id} is a {device.name} of compute capability {major}.{minor}; the kernels need 9.0 (Hopper)"
        )
    return device


def hopper_devices() -> list[int]:
    """Ids of the Hopper GPUs of this process; empty without a driver."""
    count = ctypes.c_int()
    try:
        native.library().device_count(ctypes.byref(count))
        return [i for i in range(count.value) if read_device(i).capability == (9, 0)]
    except Fp8GemmError:
        return []


def best_device() -> str:
    """The first Hopper GPU of this process, "cuda:1", or without one "cpu"."""
    hoppers = hopper_devices()
    return f"cuda:{hoppers[0]}" if hoppers else "cpu"


@functools.cache
def cpu_name() -> str:
    """The processor, in its maker's words if the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def set_num_sms(num_sms: int, device: int = 0) -> None:
    """Lets GEMMs on `device` use at most `num_sms` SMs, from 1 to all of them, as to leave some for communication.

    Raises OperandError for a number outside that range.
    """
    most = read_device(device).sms
    if isinstance(num_sms, bool) or not isinstance(num_sms, int) or not 1 <= num_sms <= most:
        raise OperandError("num_sms", f"{num_sms!r}; cuda:{device} has {most} SMs, so an int from 1 to {most}")
    native.library().limit_sms(device, num_sms if num_sms < most else 0)


def get_num_sms(device: int = 0) -> int:
    """SMs that GEMMs on `device` may use: what `set_num_sms` said, else all."""
    return int(native.library().sm_limit(device)) or read_device(device).sms
