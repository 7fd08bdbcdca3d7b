"""What a result was measured on: the machine (compare.py refuses another one), and the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import cpuinfo
import torch

from roberta_kernels import backends


def machine(device: str) -> dict[str, Any]:
    """The hardware and its settings, without host names or paths. Results compare only where all of this is equal."""
    cpu = cpuinfo.get_cpu_info()
    described = {
        "device": device,
        "cpu": cpu.get("brand_raw", platform.processor() or platform.machine()),
        "cpu_family_model_stepping": [cpu.get(key) for key in ("family", "model", "stepping")],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa_torch": torch.backends.cpu.get_cpu_capability(),
        "isa_kernels": backends.cpu_isa() if backends.cpu_isas() else None,
        "system": platform.system(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        described |= {
            "gpu": properties.name,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_gib": round(properties.total_memory / 2**30),
        }
    return described


def versions() -> dict[str, str]:
    """Of everything that computes something here."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("roberta_kernels", "triton", "numpy", "pytest-benchmark"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {name: version for name, version in found.items() if version is not None}


def load_average() -> float | None:
    """How many processes wanted a core in the last minute: near zero before a run that is to be trusted."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
