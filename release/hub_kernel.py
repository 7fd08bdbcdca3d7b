"""The layout of Hugging Face's Kernels Hub, made from this package: `python release/hub_kernel.py [OUT]`.

OUT (build/hub-kernel) becomes what kernel-builder takes (build.toml, flake.nix, torch-ext/roberta_kernels) and, in
build/torch-cuda, what it makes of that and `kernels.get_kernel` loads: the folder can be uploaded as it is. It is the
ops, the reference and Triton: Python alone, one variant for every torch.

What the Hub asks for, and how it is met:
* a kernel is loaded from any folder, under any name: its imports of itself are made relative;
* several versions live in one process: op namespaces begin with a name that is this commit's own, which the module
  `_ops` has (kernel-builder writes that one itself);
* layers have a forward alone: release/hub/layers.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, HUB = ROOT / "roberta_kernels", ROOT / "release/hub"
PARTS = ("schemas.py", "schemas.def", "backends", "ops", "reference", "triton")
VARIANT = "torch-cuda"
PREFIX = "roberta_kernels_"
SUFFIXES = (".py", ".def", ".json")


def relative(source: str, depth: int) -> str:
    """A file's text with imports of the package relative to it, `depth` folders below the package's own."""
    dots = "." * depth
    source = re.sub(r"^(\s*)from roberta_kernels import ", rf"\1from {dots} import ", source, flags=re.MULTILINE)
    return re.sub(r"^(\s*)from roberta_kernels\.", rf"\1from {dots}", source, flags=re.MULTILINE)


def own_namespace(source: str, depth: int) -> str:
    """The same with op namespaces that begin with NAMESPACE instead of "roberta_kernels"."""
    changed = re.sub(rf"torch\.ops\.{PREFIX}(\w+)", r'getattr(torch.ops, f"{NAMESPACE}_\1")', source)
    changed = re.sub(rf'f"{PREFIX}', 'f"{NAMESPACE}_', changed)
    changed = re.sub(rf'"{PREFIX}(\w+)"', r'f"{NAMESPACE}_\1"', changed)
    if changed == source:
        return source
    first = "from __future__ import annotations\n"
    assert first in changed
    return changed.replace(first, f"{first}\nfrom {'.' * depth}_namespace import NAMESPACE\n", 1)


def write_sources(folder: Path) -> None:
    """The Python package of the kernel, as kernel-builder wants it in torch-ext."""
    for part in PARTS:
        files = [PACKAGE / part] if (PACKAGE / part).is_file() else sorted((PACKAGE / part).iterdir())
        for path in files:
            if path.suffix not in SUFFIXES:
                continue
            name = path.relative_to(PACKAGE)
            text = path.read_text()
            if path.suffix == ".py":
                text = own_namespace(relative(text, len(name.parts)), len(name.parts))
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    for name in ("__init__.py", "layers.py"):
        shutil.copy(HUB / name, folder / name)
    (folder / "_namespace.py").write_text(
        '"""What op namespaces of this kernel begin with."""\n\n'
        "from ._ops import add_op_namespace_prefix\n\n"
        'NAMESPACE = add_op_namespace_prefix("").removesuffix("::")\n'
    )


def commit() -> str:
    """The commit in short, with `_dirty` where files are changed; "unknown" outside of a checkout."""
    git = ["git", "-C", str(ROOT)]
    done = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True)
    if done.returncode != 0:
        return "unknown"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "roberta_kernels", "release"])
    return done.stdout.strip() + ("_dirty" if changed.returncode else "")


def write_variant(folder: Path, sources: Path) -> None:
    """build/torch-cuda: the sources, `_ops.py`, and metadata.json with a digest of every file."""
    shutil.copytree(sources, folder)
    name = f"_{PREFIX}cuda_{commit()}"
    (folder / "_ops.py").write_text(
        f"import torch\n\nops = torch.ops.{name}\n\n\n"
        f'def add_op_namespace_prefix(op_name: str):\n    return f"{name}::{{op_name}}"\n'
    )
    digests = {
        str(path.relative_to(folder)): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    metadata = {
        "name": "roberta-kernels",
        "id": name,
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def main(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    sources = out / "torch-ext/roberta_kernels"
    write_sources(sources)
    for name in ("build.toml", "flake.nix", "CARD.md"):
        shutil.copy(HUB / name, out / name)
    write_variant(out / "build" / VARIANT, sources)
    print(f"{out}: upload it with `hf upload`, or build it with kernel-builder")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build/hub-kernel")
