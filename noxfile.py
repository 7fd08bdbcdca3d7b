"""The versions that the model tests run with, each in a virtual environment of its own.

`make test-matrix` runs the `models` sessions, `make test-floor` the one with the oldest transformers, and
`make test-newest` the one with whatever is the newest of all but torch, where that is newer than what `make test` runs
with. The compiled library is the one in the tree: it uses torch's stable ABI, so the torch that built it and the one
that loads it may differ.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import nox
from nox.command import CommandFailed
from packaging.utils import canonicalize_name

nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"

FLOOR = "5.6.0"
TORCH = "2.13.0"
# The last one is a CUDA build of several GB, and never part of CI.
MATRIX = [(FLOOR, TORCH), ("5.17.0", TORCH), ("5.23.0", TORCH), ("5.24.0", TORCH), ("5.24.0", "2.10.0")]
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
# The newest transformers is tried with these: the quick ones, what meets its classes, what somebody replaced in them.
NEWEST = (*QUICK, "test_families", "test_tools", "test_replaced_code")
# People's packages around these models, and the tests of those.
TOOLS = ("accelerate", "datasets", "peft", "sentence-transformers")
# A new release of one of these is one to try; of the others of PACKAGES the model tests meet nothing.
WATCHED = {"transformers", "tokenizers", "huggingface-hub", "safetensors", "numpy", *TOOLS}
TOOLS_TESTS = ("test_adapters", "test_parallel", "test_sentence_transformers", "test_tools")


def pip(session: nox.Session, *arguments: str) -> None:
    """The pip beside nox, as the one that comes with Python, and so with an environment, may be years old."""
    flags = ("--quiet", "--disable-pip-version-check")
    session.run(sys.executable, "-m", "pip", *flags, *arguments, external=True)


def add(session: nox.Session, *requirements: str) -> None:
    """Into the session's environment."""
    pip(session, "--python", str(session.virtualenv.location), "install", "--no-compile", *requirements)


def newer(session: nox.Session, requirements: tuple[str, ...]) -> dict[str, str]:
    """What pip would install beside what `make test` runs with, were it free to: versions by name."""
    report = Path(session.create_tmp()) / "newer.json"
    flags = ("--dry-run", "--upgrade", "--upgrade-strategy", "eager", "--report", str(report))
    pip(session, "install", *flags, *requirements)
    found = (package["metadata"] for package in json.loads(report.read_text())["install"])
    return {canonicalize_name(package["name"]): package["version"] for package in found}


def install(session: nox.Session, transformers: str, torch: str) -> None:
    """These versions; of the rest what constraints.txt pins, without what only the newest transformers goes with."""
    free = ("torch==", "triton==", "transformers==", "tokenizers==", "huggingface_hub==")
    pinned = [line for line in Path("constraints.txt").read_text().splitlines() if not line.startswith(free)]
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join(pinned))
    # Without triton the folder tests/triton would be taken for it.
    add(
        session,
        *("-c", str(constraints), f"torch=={torch}", f"transformers=={transformers}", "triton>=3.6", *PACKAGES),
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
    session.run("python", "-m", "pytest", "-n", "2", "-m", "not full", *(session.posargs or files))


@nox.session
def newest(session: nox.Session) -> None:
    """The quick tests of models with nothing pinned but torch; then, on top, the newest of what people put around them.

    In one environment, and in this order: a package that does not go with the newest transformers yet brings an older
    one in. Both parts run, whatever the first one finds; neither, where `make test` has the newest of all that matters.
    """
    free = (f"torch=={TORCH}", "transformers", "triton>=3.6")
    waiting = newer(session, (*free, *PACKAGES, *TOOLS))
    tried = {name: version for name, version in waiting.items() if name in WATCHED}
    session.log(f"newer than what make test runs with: {waiting or 'nothing'}; to be tried: {tried or 'nothing'}")
    if not tried and not session.posargs:
        return
    parts = (("transformers", PACKAGES, NEWEST), (", ".join(TOOLS), TOOLS, TOOLS_TESTS))
    broken = []
    for what, packages, tests in parts:
        add(session, "--upgrade", "--upgrade-strategy", "eager", *free, *packages)
        versions = installed_versions(session, ("torch", "transformers", *TOOLS, "tokenizers", "huggingface_hub"))
        session.log(f"newest {what}: {versions}")
        try:
            files = session.posargs or [f"tests/models/{name}.py" for name in tests]
            session.run("python", "-m", "pytest", "-n", "2", "-m", "not full", *files)
        except CommandFailed:
            broken.append(f"the newest {what} ({versions})")
    if broken:
        session.error(
            f"roberta_kernels fails with {' and with '.join(broken)}. Where `make test-fast` passes, with what "
            "constraints.txt pins, it is a new release that breaks us: nothing else differs"
        )


def installed_versions(session: nox.Session, names: tuple[str, ...]) -> str:
    """ "torch 2.13.0, transformers 5.24.0, ...", of those that are there."""
    listed = session.run("python", "-m", "pip", "list", "--format=freeze", silent=True, log=False) or ""
    found = dict(re.findall(r"^([^=\n]+)==(.+)$", listed.replace("-", "_"), flags=re.MULTILINE))
    return ", ".join(f"{name} {found[key]}" for name in names if (key := name.replace("-", "_")) in found)
