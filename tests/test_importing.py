"""Importing the package costs next to nothing: what it needs is imported when something needs it, and is there then."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOADED = "{name for name in sys.modules if '.' not in name or name.startswith('roberta_kernels')}"


def in_a_new_process(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", "import sys\n" + script], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_the_import_imports():
    script = f"import transformers\nbefore = {LOADED}\nimport roberta_kernels\nprint(sorted({LOADED} - before))"
    assert in_a_new_process(script).strip() == str(
        ["roberta_kernels", *(f"roberta_kernels.{name}" for name in ("_version", "registration", "requirements"))]
    )


@pytest.mark.parametrize("arguments", [["--help"], ["encode", "--help"], ["--version"]], ids=" ".join)
def test_help_imports_no_torch(arguments):
    script = (
        f"sys.argv = ['roberta-kernels', *{arguments}]\n"
        "from roberta_kernels.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    assert "roberta" in in_a_new_process(script)


ATTENTION = """
from transformers import RobertaConfig, RobertaModel
small = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
model = RobertaModel(RobertaConfig(**small, attn_implementation="roberta_kernels")).eval()
import torch
with torch.no_grad():
    model(torch.arange(2, 7)[None])
assert "roberta_kernels.ops.attention" in sys.modules
assert "roberta_kernels.patching" not in sys.modules
"""


@pytest.mark.parametrize("first", ["roberta_kernels", "transformers.modeling_utils"])
def test_the_attention_is_there_whatever_was_imported_first(first):
    in_a_new_process(f"import {first}\nimport roberta_kernels\n{ATTENTION}")


def test_a_saved_graph_finds_the_ops():
    in_a_new_process("import roberta_kernels, torch\ntorch.ops.roberta_kernels_reference.gelu_ffn_forward.default")


@pytest.mark.parametrize("name", ["backends", "hf.fast_class"])
def test_any_part_can_be_imported_first(name):
    in_a_new_process(f"import roberta_kernels.{name}\nimport roberta_kernels as rk\nrk.patch, rk.ops.attention")


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("first", ["transformers.masking_utils", "transformers.integrations.sdpa_attention"])
def test_the_attention_is_there_after_any_import_and_after_a_look(first, looks):
    look = (
        "import importlib.util, transformers\nimportlib.util.find_spec('transformers.modeling_utils')\n"
        if looks
        else ""
    )
    in_a_new_process(f"import roberta_kernels\n{look}import {first}\n{ATTENTION}")


def test_the_ops_are_there_after_a_look():
    look = "import roberta_kernels, importlib.util\nimportlib.util.find_spec('torch')\n"
    in_a_new_process(f"{look}import torch\ntorch.ops.roberta_kernels_reference.gelu_ffn_forward.default")


@pytest.mark.parametrize("name", ["backends", "models", "ops", "patching", "tolerance"])
def test_a_part_is_an_attribute_whatever_was_imported_before(name):
    in_a_new_process(f"import roberta_kernels as rk\nassert rk.{name}.__name__ == 'roberta_kernels.{name}'")


def test_what_is_nowhere_is_no_attribute():
    in_a_new_process("import roberta_kernels as rk\nassert not hasattr(rk, 'nowhere')")
