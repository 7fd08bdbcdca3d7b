"""What a result was measured on: the machine (compare.py refuses another one), and the versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from typing import Any

import torch

from benchmarks.results_file import commit
from roberta_kernels import backends

_ENGINES = ("onnx", "onnxruntime", "openvino")


def conditions(device: str, *packages: str) -> dict[str, Any]:
    """What a result file says of its run: when, which code, on what, beside what. packages: as in versions()."""
    return {
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit_info": commit(),
        "machine_info": machine(device),
        "versions": versions(*packages),
        "load_average_at_start": load_average(),
    }


def pick_device(wanted: str | None) -> str:
    """The device type to measure on: the wanted one, or CUDA where torch has it. Raises ValueError where it has not."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"torch {torch.__version__} finds no CUDA device")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def machine(device: str) -> dict[str, Any]:
    """The hardware and its settings, without host names or paths. Results compare only where all of this is equal."""
    try:
        import cpuinfo

        cpu = cpuinfo.get_cpu_info()
    except ImportError:  # it comes with pytest-benchmark
        cpu = {}
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


def versions(*more: str) -> dict[str, str]:
    """Of everything that computes something here. more: packages of a run's own."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("roberta_kernels", "triton", "transformers", "numpy", "pytest-benchmark", *_ENGINES, *more):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {name: version for name, version in found.items() if version is not None}


def load_average() -> float | None:
    """How many processes wanted a core in the last minute: near zero before a run that is to be trusted."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
