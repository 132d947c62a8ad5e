"""What a GPU has consumed, by the driver's own counter (NVML). torch only tells the power of the moment."""

import ctypes
import math
import time

import torch

_SECONDS_BETWEEN_READINGS = 1.0  # a reading may take a millisecond


class EnergyMeter:
    def __init__(self, device: torch.device) -> None:
        self._counter = _Counter(device) if device.type == "cuda" else None
        self._first = self._last = self._read()
        self._read_at = time.monotonic()

    def joules(self) -> float:
        """Of this device since the meter was made, by whomever; NaN where the driver does not tell."""
        now = time.monotonic()
        if now - self._read_at >= _SECONDS_BETWEEN_READINGS:
            self._read_at, self._last = now, self._read()
        return self._last - self._first

    def _read(self) -> float:
        return math.nan if self._counter is None else self._counter.joules()


class _Counter:
    """Three functions of a library whose interface is stable and which comes with the driver."""

    def __init__(self, device: torch.device) -> None:
        self._handle = ctypes.c_void_p()
        try:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
            # the number of a device differs between torch and NVML where CUDA_VISIBLE_DEVICES is set
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
            self._works = (
                self._nvml.nvmlInit_v2() == 0
                and self._nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(self._handle)) == 0
            )
        except (OSError, AttributeError):
            self._works = False

    def joules(self) -> float:
        millijoules = ctypes.c_ulonglong()
        if not self._works:
            return math.nan
        code = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(millijoules))
        return millijoules.value / 1000 if code == 0 else math.nan
