"""The shape of the package: arrows point one way, files and functions stay readable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "roberta_kernels"
FILES = {
    ".".join((("roberta_kernels"), *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# From the bottom up: what stands in a line may import what stands in a line above it, and within its own package.
LEVELS = (
    ("_version", "lazy", "requirements", "schemas", "tolerance"),
    ("reference", "triton"),
    ("backends",),
    ("ops", "unpadding"),
    ("decoder_calls", "encoder_call"),
    ("quantized",),
    ("hf",),
    ("models", "patch_report"),
    ("patching",),
    ("verification", "encoding"),
    ("demo", "api", "ray", "registration"),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("roberta_kernels"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("roberta_kernels")}
    return found


IMPORTS = {name: imports_of(path) & FILES.keys() for name, path in FILES.items()}


def part_of(name: str) -> str:
    return [*name.split("."), ""][1]


def test_every_part_of_the_package_has_a_level():
    assert {part_of(name) for name in FILES} - {""} == set(LEVEL)


def test_no_arrow_points_upward():
    upward = [
        f"{name} imports {other}"
        for name, imported in IMPORTS.items()
        for other in imported
        if part_of(name) and part_of(other) and part_of(name) != part_of(other)
        if LEVEL[part_of(name)] <= LEVEL[part_of(other)]
    ]
    assert upward == []


def test_no_circle():
    # The __init__ of a package gathers the names of its files; these ask for each other, or for whole other packages.
    graph = {name: {other for other in imported if other != name} for name, imported in IMPORTS.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_are_short(name):
    text = FILES[name].read_text()
    assert text.count("\n") <= 450, "a file of this length has two jobs"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = [
                part for part in node.body if not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))
            ]
            lines = 0 if not body else (body[-1].end_lineno or 0) - body[0].lineno + 1
            assert lines <= 70, f"{node.name} has {lines} lines: it does not fit a screen"


def test_only_one_file_owns_what_a_module_carries():
    owners = {
        name
        for name, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and node.value in ("_rk_state", "_rk_name", "_rk_memory", "_rk_implementation")
    }
    assert owners == {"roberta_kernels.hf.state"}


def test_transformers_is_named_in_one_folder_only():
    # Elsewhere it is a user's library like any other: loaded when a command needs a model, or named in a text.
    named = {
        name
        for name, path in FILES.items()
        for node in ast.parse(path.read_text()).body
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"))
        or (isinstance(node, ast.Import) and any(alias.name.startswith("transformers") for alias in node.names))
    }
    named.discard("roberta_kernels.cli.loading")  # loads a model from what a user names
    assert {name for name in named if not name.startswith("roberta_kernels.hf.")} == set()
