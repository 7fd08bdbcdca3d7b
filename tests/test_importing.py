"""Importing the package costs next to nothing: what it needs is imported when something needs it, and is there then."""

from __future__ import annotations

import subprocess
import sys

import forks
import pytest

full = pytest.mark.full
LOADED = "{name for name in sys.modules if '.' not in name or name.startswith('roberta_kernels')}"


def with_torch_and_transformers(script: str) -> None:
    done = forks.python("-c", "import sys\n" + script)
    assert done.returncode == 0, done.stderr


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


def test_what_reads_and_writes_on_a_cluster_imports_no_torch():
    in_a_new_process(
        "from roberta_kernels.ray import answers, partitions, results\n"
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules)\n"
        "import torch\ntorch.ops.roberta_kernels_reference.gelu_ffn_forward.default"
    )


@pytest.mark.parametrize("name", ["backends", "hf.fast_class"])
def test_any_part_can_be_imported_first(name):
    in_a_new_process(f"import roberta_kernels.{name}\nimport roberta_kernels as rk\nrk.patch, rk.ops.attention")


@pytest.mark.parametrize(
    ("first", "looks"),
    [
        ("transformers.integrations.sdpa_attention", True),
        pytest.param("transformers.masking_utils", False, marks=full),
    ],
)
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


@pytest.mark.parametrize("name", ["patching", *(pytest.param(name, marks=full) for name in ("models", "tolerance"))])
def test_a_part_is_an_attribute_whatever_was_imported_before(name):
    with_torch_and_transformers(f"import roberta_kernels as rk\nassert rk.{name}.__name__ == 'roberta_kernels.{name}'")


@pytest.mark.parametrize("package", ["encoding", "ray", "demo"])
def test_what_a_package_hands_out_when_asked(package):
    with_torch_and_transformers(f"""
import importlib, pkgutil, roberta_kernels
package = importlib.import_module("roberta_kernels.{package}")
assert set(package.__all__) <= set(dir(package))
assert all(hasattr(package, name) for name in package.__all__)
assert all(hasattr(package, part.name) for part in pkgutil.iter_modules(package.__path__))
assert not hasattr(package, "nowhere")
""")


def test_what_is_nowhere_is_no_attribute():
    in_a_new_process("import roberta_kernels as rk\nassert not hasattr(rk, 'nowhere')")


NO_TENSOR_IS_MADE = """
import pkgutil, importlib, roberta_kernels
from torch.utils._python_dispatch import TorchDispatchMode

class Refuse(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        raise AssertionError(f"{op} at import")

import torch, transformers.models.roberta.modeling_roberta
names = [part.name for part in pkgutil.walk_packages(roberta_kernels.__path__, "roberta_kernels.")]
assert len(names) > 50
with Refuse():
    for name in names:
        if not name.endswith(("__main__", "_cuda", "_cpu")) and name.split(".")[1] not in ("ray", "triton"):
            importlib.import_module(name)
"""


def test_no_module_makes_a_tensor_at_its_import():
    """It would be of whatever tensors are there: fake, on "meta" or a GPU, in inference mode."""
    with_torch_and_transformers(NO_TENSOR_IS_MADE)


@pytest.mark.parametrize("mode", ["FakeTensorMode()", "torch.device('meta')", "torch.inference_mode()"])
def test_the_first_patch_in_a_process_is_where_tensors_are_not_plain(mode):
    """Then all of the package's modules are imported there."""
    with_torch_and_transformers(f"""
import torch, roberta_kernels as rk
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import RobertaConfig, RobertaModel
config = RobertaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
with {mode}:
    report = rk.patch(RobertaModel(config).eval())
assert not report.left, report
""")
