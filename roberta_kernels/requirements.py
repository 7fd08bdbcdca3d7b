"""The oldest versions that are supported, checked when the package is imported."""

from __future__ import annotations

import sys
from importlib import metadata

from packaging.version import Version

PYTHON_FLOOR = "3.10"
FLOORS = {"torch": "2.10", "transformers": "5.6"}


def check() -> None:
    """Raises ImportError, in one line, where Python, torch or transformers is missing or too old."""
    python = ".".join(str(part) for part in sys.version_info[:3])
    if Version(python) < Version(PYTHON_FLOOR):
        raise ImportError(f"roberta_kernels requires Python >= {PYTHON_FLOOR}, got {python}")
    for package, floor in FLOORS.items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise ImportError(f"roberta_kernels requires {package} >= {floor}, which is not installed") from None
        # A pre-release or local build of the floor counts as the floor.
        if Version(Version(found).base_version) < Version(floor):
            raise ImportError(f"roberta_kernels requires {package} >= {floor}, got {found}")
