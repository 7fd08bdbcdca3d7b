"""The command `env`: what is installed, which kernels can run, and why the others cannot."""

from __future__ import annotations

import os
import sys
from importlib import metadata

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from roberta_kernels._version import __version__
from roberta_kernels.cli.console import out


def show() -> None:
    """Prints it all."""
    import torch

    from roberta_kernels import backends
    from roberta_kernels.backends import choosing

    out.print(_versions())

    table = Table("backend", "available", "detail", box=SIMPLE_HEAD, pad_edge=False)
    for name, status in backends.available_backends().items():
        table.add_row(name, Text("yes", "green") if status else Text("no", "yellow"), Text(status.detail))
    out.print(table)
    asked = f" ({backends.ENVIRONMENT_VARIABLE})" if os.environ.get(backends.ENVIRONMENT_VARIABLE) else ""
    out.print(f"asked for: {backends.current_backend()}{asked}")
    out.print(f"float32 on the CPU runs on: {backends.serving(torch.empty(0))}")
    if torch.cuda.is_available():
        gpu = backends.serving(torch.empty(0, device="cuda", dtype=torch.bfloat16))
        out.print(f"bfloat16 on the GPU runs on: {gpu}")
        for name, why in gpu.broken.items():
            out.print(f"{name} cannot run on this GPU: {why}")

    table = Table("op", "GPU", "dtype", "size", "backend", "from", box=SIMPLE_HEAD, pad_edge=False)
    for row in backends.choices():
        cells = (row[key] for key in ("op", "architecture", "dtype", "size", "backend", "from"))
        table.add_row(*(Text(cell, "bold" if row["here"] else "") for cell in cells))
    out.print("on NVIDIA GPUs, sizes in tokens (attention: of the longest sequence):")
    out.print(table)
    for op in choosing.VARIANTS:
        if (variant := backends.cuda_variant(op)) is not None:
            out.print(f"variant of {op} in the CUDA library: {variant}")

    report = backends.build_report()
    if not report:
        out.print("build: no report; nothing was compiled when this was installed")
        return
    build = Table("build", "", box=SIMPLE_HEAD, pad_edge=False)
    for key, value in report.items():
        build.add_row(key, Text(", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    out.print(build)


def _versions() -> Table:
    import torch

    table = Table(box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_row("roberta_kernels", __version__)
    table.add_row("Python", ".".join(map(str, sys.version_info[:3])))
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    table.add_row("torch", f"{torch.__version__} ({cuda})")
    for package in ("transformers", "triton"):
        table.add_row(package, _version_of(package))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            capability = f"compute capability {gpu.major}.{gpu.minor}"
            table.add_row(f"GPU {i}", f"{gpu.name}, {capability}, {gpu.total_memory / 2**30:.0f} GiB")
    else:
        table.add_row("GPU", "none that torch can use")
    table.add_row("CPU", f"{torch.get_num_threads()} threads; {torch.backends.cpu.get_cpu_capability()} for torch")
    return table


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
