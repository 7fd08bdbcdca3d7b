"""The kernel for Hugging Face's Kernels Hub (release/hub_kernel.py): what it imports, and that `kernels` loads it."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "kernel"
    subprocess.run([sys.executable, ROOT / "release/hub_kernel.py", folder], check=True)
    return folder


def test_imports_are_relative_or_of_what_every_user_has(made):
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    files = list((made / "torch-ext").rglob("*.py"))
    assert len(files) > 30
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            # Triton's interpreter, which only tests run, is made of numpy.
            more = {"numpy"} if path.name == "interpreter.py" else set()
            assert {name.split(".")[0] for name in names} <= allowed | more, path


def test_op_namespaces_are_this_versions_own(made):
    for path in (made / "torch-ext").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("roberta_kernels_"), path


LOAD = """
import sys
from pathlib import Path
import torch, kernels
from kernels import Mode, kernelize
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
from transformers import RobertaConfig, RobertaModel
from transformers.models.roberta import modeling_roberta
import roberta_kernels as rk

made = Path(sys.argv[1])
variant = made / "build/torch-cuda"
Build.open(made)  # refuses what it does not know
Metadata.read_from_file(variant / "metadata.json").digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
kernel = kernels.get_local_kernel(variant)  # the variant itself: this torch has no CUDA
(loaded,) = kernels.get_loaded_kernels()
assert loaded.metadata.id.startswith("_roberta_kernels_cuda_"), loaded.metadata.id

# beside the package, whose ops are others of the same names
torch.manual_seed(0)
x, residual, weight, bias = torch.randn(7, 32), torch.randn(7, 32), torch.rand(32), torch.randn(32)
exact = torch.nn.functional.layer_norm((x + residual).double(), (32,), weight.double(), bias.double(), 1e-5)
for name in ("triton", "reference"):
    with kernel.backend(name), rk.backend(name):
        for ops in (kernel, rk.ops):
            out = ops.add_layer_norm(x, residual, weight, bias, eps=1e-5)
            torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)

config = RobertaConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)
model = RobertaModel(config)
ids = torch.randint(3, 50, (2, 9))
before = model(ids).last_hidden_state
mapping = {}
for name in ("RobertaSelfOutput", "RobertaOutput"):
    kernels.replace_kernel_forward_from_hub(getattr(modeling_roberta, name), name)
    mapping[name] = {"cuda": kernels.LocalLayerRepository(variant, layer_name=name)}
torch.cuda.get_device_capability = lambda device=None: (9, 0)  # kernelize asks for that of a device
with kernels.use_kernel_mapping(mapping):
    kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cuda", use_fallback=False)
layer = model.encoder.layer[0]
for module in (layer.attention.output, layer.output):
    assert "roberta_kernels" in module.forward.__func__.__module__, module.forward
with kernel.backend("triton"):
    after = model(ids).last_hidden_state
    after.square().mean().backward()
torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
assert layer.output.LayerNorm.weight.grad.abs().sum() > 0
print("loaded")
"""


@pytest.mark.full
def test_kernels_loads_it_and_replaces_layers(made):
    if importlib.util.find_spec("kernels") is None:
        pytest.skip("needs kernels (make test-hub-kernel)")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", LOAD, str(made)]
    done = subprocess.run(command, env=environment, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("loaded")
