"""An installed package, used: `python smoke.py [no-compiler]` in an environment that has it, away from the sources.

no-compiler: there must be none on the path, so that what is compiled has come with the package.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

if "no-compiler" in sys.argv:
    assert not [name for name in ("cc", "gcc", "g++", "c++", "clang", "nvcc", "ninja") if shutil.which(name)]

import torch
from transformers import RobertaConfig, RobertaModel

import roberta_kernels as rk

assert Path(rk.__file__).is_relative_to(sys.prefix), f"this is {rk.__file__}, which was not installed here"
backends = rk.available_backends()
assert backends["cpu"], backends["cpu"].detail

torch.manual_seed(0)
config = RobertaConfig(
    vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, pad_token_id=1
)
model = RobertaModel(config).eval()
batch = {"input_ids": torch.randint(2, 100, (3, 20)), "attention_mask": torch.ones(3, 20, dtype=torch.long)}
batch["attention_mask"][1, 7:] = 0
batch["input_ids"][1, 7:] = config.pad_token_id
with torch.no_grad():
    before = model(**batch).last_hidden_state
    report = rk.patch(model, backend="cpu")
    after = model(**batch).last_hidden_state
assert report.fallbacks() == {}, report.fallbacks()
torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
verified = rk.verify(model, batch)
assert verified.holds, verified
print(f"roberta_kernels {rk.__version__}, {backends['cpu'].detail}: the promise holds")
