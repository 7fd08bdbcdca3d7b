"""The versions that the model tests run with, each in a virtual environment of its own.

`make test-matrix` runs every session, `make test-floor` the one with the oldest transformers. The compiled library is
the one in the tree: it uses torch's stable ABI, so the torch that built it and the one that loads it may differ.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"

FLOOR = "5.6.0"
TORCH = "2.13.0"
# The last one is a CUDA build of several GB, and never part of CI.
MATRIX = [(FLOOR, TORCH), ("5.17.0", TORCH), ("5.23.0", TORCH), ("5.23.0", "2.10.0")]
PACKAGES = (
    "accelerate",
    "hypothesis",
    "numpy",
    "packaging",
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",
    "rich",
    "typer",
)
# Of each way in, and of each part that reads transformers' internals, one file; it takes two minutes on two cores.
QUICK = (
    "test_patching",
    "test_saving",
    "test_attention_interface",
    "test_generation",
    "test_plain_use",
    "test_packing",
)


def install(session: nox.Session, transformers: str, torch: str) -> None:
    """These versions; of the rest what constraints.txt pins, without what only the newest transformers goes with."""
    free = ("torch==", "triton==", "transformers==", "tokenizers==", "huggingface_hub==")
    pinned = [line for line in Path("constraints.txt").read_text().splitlines() if not line.startswith(free)]
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join(pinned))
    # Without triton the folder tests/triton would be taken for it.
    session.install(
        *("-c", str(constraints), f"torch=={torch}", f"transformers=={transformers}", "triton>=3.6", *PACKAGES)
    )


@nox.session
@nox.parametrize(("transformers", "torch"), MATRIX)
def models(session: nox.Session, transformers: str, torch: str) -> None:
    """All tests of models."""
    install(session, transformers, torch)
    session.run("python", "-m", "pytest", "-n", "2", *(session.posargs or ["tests/models"]))


@nox.session
def floor(session: nox.Session) -> None:
    """The quick tests of models with the oldest transformers."""
    install(session, FLOOR, TORCH)
    files = [f"tests/models/{name}.py" for name in QUICK]
    session.run("python", "-m", "pytest", "-n", "2", "-m", "not slow", *(session.posargs or files))
