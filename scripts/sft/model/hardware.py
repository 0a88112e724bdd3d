"""This machine's device, its memory and what it can compute. NVML answers without torch."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sft.errors import ConfigError


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


def choose(device_map: str) -> Hardware:
    """The device that `model.device_map` names (`auto`, `cpu`, `cuda`, `cuda:1`), which torch uses from here on.

    Raises ConfigError if it does not exist.
    """
    if device_map == "cpu":
        total, available = memory()
        return Hardware("cpu", "the CPU", None, total, available, bf16=True, count=1)
    device = probe()
    gpus = [f"cuda:{number}" for number in range(device.count)] if device.device == "cuda" else []
    if device_map not in ("auto", *gpus) and not (device_map == "cuda" and gpus):
        what = f"model.device_map is {device_map}, and this machine has {', '.join(gpus) or 'no CUDA GPU'}"
        raise ConfigError(what, where="model.device_map", fix="--set model.device_map=auto")
    if device_map in gpus:
        import torch

        torch.cuda.set_device(gpus.index(device_map))
        device = probe()
    return device


def probe() -> Hardware:
    """torch's current CUDA GPU (that of this process's rank, if there are several processes), else the CPU.

    bf16: compute capability >= 8, or CPU. Lets torch's segments of GPU memory grow in place (set before the first is
    allocated), so that rows of mixed lengths fragment it less; not if the user has set the allocator, nor on WSL, whose
    driver refuses it (pytorch/pytorch#192330).
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and "microsoft" not in platform.release().lower():
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    import torch

    if not torch.cuda.is_available():
        return choose("cpu")
    count = torch.cuda.device_count()
    index = local_rank() % count if "LOCAL_RANK" in os.environ else torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(index)
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    return Hardware("cuda", name, capability, total, free, capability[0] >= 8, count)


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
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    allowed = None if setting is None else [part.strip() for part in setting.split(",") if part.strip()]
    visible = []
    for index in range(nvml.nvmlDeviceGetCount() if nvml is not None else 0):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = nvml.nvmlDeviceGetUUID(handle)
        if allowed is None or any(part == str(index) or uuid.startswith(part) for part in allowed):
            sizes = nvml.nvmlDeviceGetMemoryInfo(handle)
            capability = nvml.nvmlDeviceGetCudaComputeCapability(handle)
            name = nvml.nvmlDeviceGetName(handle)
            visible.append(Gpu(index, name, tuple(capability), int(sizes.total), int(sizes.free)))
    return visible


def driver() -> str | None:
    """The NVIDIA driver's version; None without one."""
    nvml = _nvml()
    return None if nvml is None else nvml.nvmlSystemGetDriverVersion()


def gpu_stats() -> dict[str, float] | None:
    """Memory (bytes), utilisation (0-1), temperature (degrees C) and power (W) of this process's GPU; None without."""
    nvml, visible = _nvml(), gpus()
    if not visible:
        return None
    gpu = visible[local_rank() % len(visible)]
    handle = nvml.nvmlDeviceGetHandleByIndex(gpu.index)
    stats = {"memory_used": float(gpu.total_bytes - gpu.free_bytes), "memory_total": float(gpu.total_bytes)}
    readings: dict[str, Callable[[], float]] = {
        "utilisation": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        "temperature": lambda: float(nvml.nvmlDeviceGetTemperature(handle, 0)),  # 0: the sensor on the chip
        "power": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }
    for name, read in readings.items():
        with contextlib.suppress(nvml.NVMLError):  # some cards do not report it
            stats[name] = read()
    return stats


def _nvml() -> Any:
    try:
        import pynvml  # type: ignore[import-untyped, unused-ignore]

        pynvml.nvmlInit()
    except Exception:  # no driver, no library: no GPU
        return None
    return pynvml


def _cgroup(name: str) -> int | None:
    try:
        return int(Path("/sys/fs/cgroup", name).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
