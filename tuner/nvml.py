"""What NVML, the driver's management library, tells of a GPU: how busy it is and at which clock its SMs run."""

from typing import Any


class Nvml:
    """What NVML tells of one GPU. A question that it does not answer gives None, or for utilisation, busy."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def open(cls, uuid: str) -> "Nvml | None":
        """None without NVML, or where it does not know the GPU."""
        try:
            from cuda.bindings import nvml
        except ImportError:
            return None
        try:
            nvml.init_v2()
            return cls(nvml, nvml.device_get_handle_by_uuid(uuid))
        except (nvml.NvmlError, RuntimeError):
            return None

    def utilisation(self) -> int:
        """Percent of the last interval in which a kernel ran."""
        try:
            return int(self._nvml.device_get_utilization_rates(self._handle).gpu)
        except (self._nvml.NvmlError, RuntimeError):
            return 100

    def clock_hz(self) -> float | None:
        try:
            return 1e6 * int(self._nvml.device_get_clock_info(self._handle, self._nvml.ClockType.CLOCK_SM))
        except (self._nvml.NvmlError, RuntimeError):
            return None
