"""This machine's device, its memory and what it can compute. NVML answers without torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Hardware:
    """The device of this process. Bytes are of the GPU's memory, or of the system's if there is no GPU."""

    device: Literal["cuda", "cpu"]
    name: str
    capability: tuple[int, int] | None
    total_bytes: int
    free_bytes: int
    bf16: bool
    count: int


@dataclass(frozen=True)
class Gpu:
    """A GPU as NVML sees it."""

    index: int
    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int


def probe() -> Hardware:
    """The device to use: the process's first visible CUDA GPU, else the CPU. bf16: compute capability >= 8, or CPU.

    Lets torch's segments of GPU memory grow in place (set before the first is allocated), so that rows of mixed lengths
    fragment it less; not if the user has set the allocator, nor on WSL, whose driver refuses it
    (pytorch/pytorch#192330).
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and "microsoft" not in platform.release().lower():
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    import torch

    if not torch.cuda.is_available():
        total, available = memory()
        return Hardware("cpu", platform.processor() or platform.machine(), None, total, available, bf16=True, count=1)
    index = local_rank() % torch.cuda.device_count()
    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    name, count = torch.cuda.get_device_name(index), torch.cuda.device_count()
    return Hardware("cuda", name, (major, minor), total, free, bf16=major >= 8, count=count)


def local_rank() -> int:
    """This process's rank among those of this machine; 0 for a single process."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def memory() -> tuple[int, int]:
    """The system's memory: (total, available) bytes, within the container's limit if there is one."""
    import psutil

    now = psutil.virtual_memory()
    total, available = int(now.total), int(now.available)
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit and limit < total:
        total, available = limit, max(0, min(available, limit - (used or 0)))
    return total, available


def gpus() -> list[Gpu]:
    """Every NVIDIA GPU that CUDA_VISIBLE_DEVICES allows, by NVML alone; none without a driver. Imports no torch."""
    nvml = _nvml()
    visible = []
    for index in range(nvml.nvmlDeviceGetCount() if nvml is not None else 0):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        sizes = nvml.nvmlDeviceGetMemoryInfo(handle)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        if _is_visible(index, _text(nvml.nvmlDeviceGetUUID(handle))):
            name = _text(nvml.nvmlDeviceGetName(handle))
            visible.append(Gpu(index, name, (int(major), int(minor)), int(sizes.total), int(sizes.free)))
    return visible


def driver() -> str | None:
    """The NVIDIA driver's version; None without one."""
    nvml = _nvml()
    return None if nvml is None else _text(nvml.nvmlSystemGetDriverVersion())


def gpu_stats() -> dict[str, float] | None:
    """Memory (bytes), utilisation (0-1), temperature (degrees C) and power (W) of this process's GPU; None without."""
    nvml = _nvml()
    visible = gpus()
    if nvml is None or not visible:
        return None
    handle = nvml.nvmlDeviceGetHandleByIndex(visible[local_rank() % len(visible)].index)
    sizes = nvml.nvmlDeviceGetMemoryInfo(handle)
    stats = {"memory_used": float(sizes.used), "memory_total": float(sizes.total)}
    readings: dict[str, Callable[[], float]] = {
        "utilisation": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        "temperature": lambda: float(nvml.nvmlDeviceGetTemperature(handle, 0)),  # 0: the sensor on the chip
        "power": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }
    for name, read in readings.items():
        try:
            stats[name] = float(read())
        except nvml.NVMLError:  # some cards do not report it
            continue
    return stats


def _nvml() -> Any:
    try:
        import pynvml  # type: ignore[import-untyped, unused-ignore]

        pynvml.nvmlInit()
    except Exception:  # no driver, no library: no GPU
        return None
    return pynvml


def _is_visible(index: int, uuid: str) -> bool:
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    if setting is None:
        return True
    devices = [part.strip() for part in setting.split(",") if part.strip()]
    return str(index) in devices or any(uuid.startswith(part) for part in devices if part.startswith("GPU-"))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _cgroup(name: str) -> int | None:
    try:
        with open(f"/sys/fs/cgroup/{name}", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None
