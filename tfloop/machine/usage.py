"""How busy the processors are: each core, and a GPU by NVIDIA's own library."""

import os
from pathlib import Path
from typing import Any

import tensorflow as tf


class Usage:
    """Shares of time since it was last asked, and what a GPU reports of itself."""

    def __init__(self, stat: str | Path = "/proc/stat") -> None:
        """Make one.

        Args:
          stat: Linux's file of the time that each core spent.
        """
        self._stat, self._before = Path(stat), dict[int, tuple[int, int]]()
        self._last = dict[int, float]()
        self._nvml = _nvml() if tf.config.list_logical_devices("GPU") else None
        self._cores()

    def scalars(self) -> dict[str, float]:
        """By tag: "machine/core_0" in percent, and "machine/gpu_…" where there is a GPU."""
        return {
            f"machine/core_{core}": share for core, share in self._cores().items()
        } | self._of_gpu()

    def _cores(self) -> dict[int, float]:
        """Percent of the time since the last call that each core of this process was busy."""
        try:
            lines = self._stat.read_text(encoding="ascii").splitlines()
        except OSError:  # not Linux
            return {}
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        found = {}
        for line in lines:
            name, *numbers = line.split()
            if not name.startswith("cpu") or not name[3:].isdigit() or int(name[3:]) not in allowed:
                continue
            core, spent = int(name[3:]), [int(number) for number in numbers[:8]]
            total, idle = sum(spent), spent[3] + spent[4]  # idle, and waiting for a disk
            if core in self._before:
                before = self._before[core]
                if total > before[0]:  # else the clock, of 10 ms, has not ticked
                    self._last[core] = 100.0 * (1.0 - (idle - before[1]) / (total - before[0]))
                found[core] = self._last.get(core, 0.0)
            self._before[core] = total, idle
        return found

    def _of_gpu(self) -> dict[str, float]:
        if not self._nvml:
            return {}
        nvml, gpu = self._nvml
        asked = {
            "machine/gpu_utilisation_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
            "machine/gpu_memory_mib": lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).used / 2**20,
            "machine/gpu_power_w": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000.0,
            "machine/gpu_temperature_c": lambda: nvml.nvmlDeviceGetTemperature(
                gpu, nvml.NVML_TEMPERATURE_GPU
            ),
        }
        found = {}
        for tag, ask in asked.items():
            try:
                found[tag] = float(ask())
            except nvml.NVMLError:  # what this GPU does not tell
                continue
        return found


def _nvml() -> Any:
    """(NVIDIA's library, the GPU that is used), ready to be asked; None without nvidia-ml-py."""
    try:
        import pynvml

        pynvml.nvmlInit()
        place = _place(os.environ.get("CUDA_VISIBLE_DEVICES", ""), _number_of_gpu())
        if place.isdecimal():
            return pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(place))
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(place)
    except Exception:  # not installed, no driver, or a GPU that may not be asked
        return None


def _number_of_gpu() -> int:
    """Among those that CUDA shows: that of TensorFlow's first visible one."""
    visible = tf.config.get_visible_devices("GPU")
    return int(visible[0].name.rpartition(":")[2]) if visible else 0


def _place(shown: str, number: int) -> str:
    """What NVIDIA's library knows a GPU by, which counts those that CUDA does not show, too.

    Args:
      shown: CUDA_VISIBLE_DEVICES, numbers or "GPU-…" of those that are shown.
      number: among these.
    """
    places = [place.strip() for place in shown.split(",") if place.strip()]
    return places[number] if number < len(places) else str(number)
