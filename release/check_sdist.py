"""`python check_sdist.py FILE.tar.gz`: the sdist has every file that git has of the package, its sources and tests."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("roberta_kernels/", "csrc/", "tests/", "examples/", "release/")
FILES = {"setup.py", "pyproject.toml", "Makefile", "constraints.txt", "noxfile.py", "README.md", "LICENSE"}


def main() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    wanted = {name for name in listed if name.startswith(FOLDERS) or name in FILES}
    with tarfile.open(sys.argv[1]) as sdist:
        found = {name.partition("/")[2] for name in sdist.getnames()}
    missing = sorted(wanted - found)
    assert len(wanted) > 200
    assert not missing, f"{sys.argv[1]} lacks {', '.join(missing)} (MANIFEST.in)"
    compiled = [name for name in found if name.endswith((".so", ".o"))]
    assert not compiled, f"{sys.argv[1]} has {compiled}"
    print(f"{sys.argv[1]}: {len(wanted)} files")


if __name__ == "__main__":
    main()
