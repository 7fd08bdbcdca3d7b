"""The ops and `attn_implementation="roberta_kernels"` are there in every process that imports the package, whose import
costs next to nothing: `import transformers` imports no torch until a program needs it, and neither does this package.

torch learns of the ops when it is imported, so that a saved graph that holds them can be loaded; transformers of the
attention, when it imports the modules that hold its own.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any


def _register_ops() -> None:
    # Else one of ours is what imports torch, half way through its own import.
    if not any(_half_way(name) for name in list(sys.modules) if name.startswith("roberta_kernels.")):
        importlib.import_module("roberta_kernels.ops")


_OF_ATTENTION = ("transformers.modeling_utils", "transformers.masking_utils")


def _register_attention() -> None:
    # Either may be what imports the other, half way through its own import: then the end of that is soon enough.
    if not any(_half_way(name) for name in _OF_ATTENTION):
        importlib.import_module("roberta_kernels.hf.attention_interface")  # which registers itself


def _half_way(name: str) -> bool:
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


# What is done when a module is there.
WHEN = {"torch": _register_ops} | dict.fromkeys(_OF_ATTENTION, _register_attention)


def register() -> None:
    """Does now what concerns modules that are imported, and the rest right after their import."""
    for name, action in WHEN.items():
        if name in sys.modules:
            action()
        else:
            sys.meta_path.insert(0, _Watch(name))


class _Watch(MetaPathFinder):
    """Stands in sys.meta_path until a module is imported, which the other finders find. Who only looks whether it could
    be imported (importlib.util.find_spec) changes nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        others = (finder for finder in list(sys.meta_path) if not isinstance(finder, _Watch))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            spec._initializing = False  # type: ignore[attr-defined]  # it is all there
            WHEN[name]()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
