"""What this machine has: the device to train on, its memory, what it can compute. NVML answers without torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Hardware:
    """The device of this process. Bytes are of the GPU's memory, or of the system's where there is no GPU."""

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
    """The device to use: the process's first visible CUDA GPU, else the CPU. bf16: compute capability >= 8, or CPU."""
    _steady_allocator()
    import torch

    if not torch.cuda.is_available():
        return _cpu()
    index = local_rank() % torch.cuda.device_count()
    free, total = torch.cuda.mem_get_info(index)
    capability = torch.cuda.get_device_capability(index)
    return Hardware(
        device="cuda",
        name=torch.cuda.get_device_name(index),
        capability=(capability[0], capability[1]),
        total_bytes=total,
        free_bytes=free,
        bf16=capability >= (8, 0),
        count=torch.cuda.device_count(),
    )


def _steady_allocator() -> None:
    """Lets torch's segments of GPU memory grow in place, before the first is made: rows of mixed lengths tear memory
    less. What the user has set stands; not on WSL, whose driver refuses it (pytorch/pytorch#192330).
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and "microsoft" not in platform.release().lower():
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def local_rank() -> int:
    """This process's place among those of this machine; 0 where there is one."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def memory() -> tuple[int, int]:
    """The system's memory: (total, available) bytes, the container's limit respected where there is one."""
    import psutil

    now = psutil.virtual_memory()
    total, available = int(now.total), int(now.available)
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit and limit < total:
        total, available = limit, max(0, min(available, limit - (used or 0)))
    return total, available


def gpus() -> list[Gpu]:
    """Every NVIDIA GPU that CUDA_VISIBLE_DEVICES leaves, by NVML alone; none without a driver. Imports no torch."""
    nvml = _nvml()
    if nvml is None:
        return []
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        room = nvml.nvmlDeviceGetMemoryInfo(handle)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        uuid = _text(nvml.nvmlDeviceGetUUID(handle))
        if _visible(index, uuid):
            name = _text(nvml.nvmlDeviceGetName(handle))
            found.append(Gpu(index, name, (int(major), int(minor)), int(room.total), int(room.free)))
    return found


def driver() -> str | None:
    """The NVIDIA driver's version; None without one."""
    nvml = _nvml()
    return None if nvml is None else _text(nvml.nvmlSystemGetDriverVersion())


def gpu_stats() -> dict[str, float] | None:
    """Memory (bytes), utilisation (0-1), temperature (degrees C) and power (W) of this process's GPU; None without."""
    nvml = _nvml()
    visible = gpus() if nvml is not None else []
    if nvml is None or not visible:
        return None
    handle = nvml.nvmlDeviceGetHandleByIndex(visible[local_rank() % len(visible)].index)
    room = nvml.nvmlDeviceGetMemoryInfo(handle)
    stats = {"memory_used": float(room.used), "memory_total": float(room.total)}
    readings: dict[str, Callable[[], float]] = {
        "utilisation": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        "temperature": lambda: float(nvml.nvmlDeviceGetTemperature(handle, 0)),  # 0: the sensor on the chip
        "power": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }
    for name, read in readings.items():
        try:
            stats[name] = float(read())
        except nvml.NVMLError:  # some cards do not tell
            continue
    return stats


def _cpu() -> Hardware:
    total, available = memory()
    return Hardware("cpu", platform.processor() or platform.machine(), None, total, available, bf16=True, count=1)


def _nvml() -> Any:
    try:
        import pynvml  # type: ignore[import-untyped, unused-ignore]

        pynvml.nvmlInit()
    except Exception:  # no driver, no library: no GPU
        return None
    return pynvml


def _visible(index: int, uuid: str) -> bool:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return True
    wanted = [part.strip() for part in named.split(",") if part.strip()]
    return str(index) in wanted or any(uuid.startswith(part) for part in wanted if part.startswith("GPU-"))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _cgroup(name: str) -> int | None:
    try:
        with open(f"/sys/fs/cgroup/{name}", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None
