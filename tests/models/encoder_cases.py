"""What the tests of inference as one op call share: small models, which ops ran, and all that may happen to a model
between two calls."""

from __future__ import annotations

import copy
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_cases import Case, Ops, batches_for, build, patched
from torch import nn
from torch.nn.utils import parametrize, prune

CALL = "roberta_kernels_cpu::encoder"  # on the parameters
PACKED_CALL = "roberta_kernels_cpu::packed_encoder"  # on quantised copies
PACK = "roberta_kernels_cpu::pack_weight"
SMALL = {
    **{"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3},
    **{"intermediate_size": 96, "hidden_act": "gelu", "type_vocab_size": 1},
}
layouts = pytest.mark.parametrize("layout", ["unpadded", "padded"])


def case_of(head="pooler", **kwargs):
    return Case(seed=4, head=head, config=SMALL | kwargs.pop("config", {}), **kwargs)


def pair(layout="unpadded", **options):
    """A model, a patched copy of it, and batches."""
    case = case_of()
    original = build(case)
    return original, patched(original, layout=layout, **options), batches_for(case, original.config, 2)


def hidden(model, inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def calls(model, inputs):
    """How often each op of the package ran in one call."""
    with Ops() as ops:
        hidden(model, inputs)
    return {name: ops.names.count(name) for name in ops.names if name.startswith("roberta_kernels_cpu")}


def layers_of(model):
    base = model.base_model
    return (base.transformer if hasattr(base, "transformer") else base.encoder).layer


# --- what happens to weights and modules between two calls ------------------------------------------------------------


def optimiser_step(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.02).step()


def loaded(assign):
    def change(model):
        model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()}, assign=assign)

    change.__name__ = "load_state_dict, assign" if assign else "load_state_dict"
    return change


def in_place(model):
    with torch.no_grad():
        layers_of(model)[1].intermediate.dense.weight.mul_(1.2)


def one_element(model):
    with torch.no_grad():
        layers_of(model)[1].intermediate.dense.weight[7, 5] += 8


def through_data(model):
    layers_of(model)[1].intermediate.dense.weight.data.mul_(1.2)


def one_row_through_data(model):
    layers_of(model)[1].attention.self.value.weight.data[13] += 2


def one_column_through_data(model):
    layers_of(model)[2].output.dense.weight.data[:, 17] *= -8


def one_element_through_data(model):
    layers_of(model)[0].attention.output.dense.weight.data[63, 1] += 8


def bias_through_data(model):
    layers_of(model)[0].attention.self.value.bias.data[3] += 4


def norm_through_data(model):
    layers_of(model)[1].attention.output.LayerNorm.weight.data[3] *= 4


def through_numpy(model):
    layers_of(model)[1].attention.self.value.weight.detach().numpy()[:] *= 1.2


def one_element_through_numpy(model):
    layers_of(model)[1].intermediate.dense.weight.detach().numpy()[95, 0] += 8


def bias_through_numpy(model):
    layers_of(model)[2].output.dense.bias.detach().numpy()[5] += 4


def other_data(model):
    weight = layers_of(model)[1].attention.output.dense.weight
    weight.data = weight.data * 1.2


def turned_data(model):
    weight = layers_of(model)[1].attention.self.value.weight
    weight.data = weight.data.t()


def other_parameter(model):
    dense = layers_of(model)[1].output.dense
    dense.weight = nn.Parameter(dense.weight.detach() * 1.2)


def other_module(model):
    core = layers_of(model)[1].attention.self
    core.query = copy.deepcopy(core.query)
    in_place_of(core.query)


def in_place_of(linear):
    with torch.no_grad():
        linear.weight.mul_(1.5)
        linear.bias.add_(0.5)


def other_class(model):
    class Louder(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 1.2

    layers_of(model)[1].intermediate.dense.__class__ = Louder


def bias(model):
    with torch.no_grad():
        layers_of(model)[1].intermediate.dense.bias.add_(0.3)


def other_norm(model):
    norm = layers_of(model)[1].output.LayerNorm
    norm.weight = nn.Parameter(norm.weight.detach() * 1.2)
    norm.bias.data = norm.bias.data + 0.2


def epsilon(model):
    for layer in layers_of(model):
        layer.output.LayerNorm.eps = layer.attention.output.LayerNorm.eps = 0.5


def scaling(model):
    for layer in layers_of(model):
        layer.attention.self.scaling = 0.5


def activation(model):
    for layer in layers_of(model):
        layer.intermediate.intermediate_act_fn = nn.ReLU()


def reordered(model):
    model.encoder.layer = nn.ModuleList([model.encoder.layer[i] for i in (2, 0, 1)])


def one_more_layer(model):
    model.encoder.layer.append(copy.deepcopy(model.encoder.layer[0]))


def one_layer_less(model):
    del model.encoder.layer[0]


def half_precision_and_back(model):
    model.bfloat16().float()


def pruned(model):
    prune.l1_unstructured(layers_of(model)[1].output.dense, "weight", amount=0.5)


def parametrised(model):
    class Twice(nn.Module):
        def forward(self, weight):
            return weight * 1.3

    parametrize.register_parametrization(layers_of(model)[1].output.dense, "weight", Twice())


def forward_bound(model):
    def forward(self, x):
        return self.intermediate_act_fn(self.dense(x)) * 1.2

    intermediate = layers_of(model)[1].intermediate
    intermediate.forward = types.MethodType(forward, intermediate)


def forward_hook(model):
    layers_of(model)[1].intermediate.register_forward_hook(lambda module, args, output: output * 1.2)


def forward_pre_hook(model):
    layers_of(model)[1].attention.self.key.register_forward_pre_hook(lambda module, args: (args[0] * 1.2,))


def layer_hook(model):
    layers_of(model)[1].register_forward_hook(lambda module, args, output: output * 1.2)


def encoder_hook(model):
    model.encoder.register_forward_pre_hook(lambda module, args: (args[0] * 1.2, *args[1:]))


# Edits of some numbers, of which torch counts nothing, and which only copies could miss.
UNCOUNTED = (
    *(one_row_through_data, one_column_through_data, one_element_through_data, one_element_through_numpy),
    *(bias_through_data, bias_through_numpy, norm_through_data),
)
CHANGES = (
    *(optimiser_step, in_place, through_data, through_numpy, other_data, turned_data, other_parameter, other_module),
    *(one_element, other_class, bias, other_norm, epsilon, scaling, activation),
    *(reordered, one_more_layer, one_layer_less, half_precision_and_back, pruned, parametrised),
    *(forward_bound, forward_hook, forward_pre_hook, layer_hook, encoder_hook, loaded(False), loaded(True)),
)


def named_change(change: Callable[[Any], None]) -> str:
    return change.__name__


# --- memory -----------------------------------------------------------------------------------------------------------

MEMORY = """
import os
import sys

import torch
import transformers
import roberta_kernels as rk

LAYERS = int(sys.argv[4])


def resident():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(lines["VmRSS"].split()[0]) / 1024

config = transformers.RobertaConfig(
    vocab_size=100, max_position_embeddings=66, hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
    num_hidden_layers=LAYERS,
)
model = transformers.RobertaModel(config).eval()
if sys.argv[3]:
    model.save_pretrained(sys.argv[3])
    for file in os.scandir(sys.argv[3]):  # pages that wait to be written cannot leave memory
        with open(file, "rb") as opened:
            os.fsync(opened)
    del model
    model = transformers.RobertaModel.from_pretrained(sys.argv[3]).eval()
weights = LAYERS * 12 * 1024**2 * 4 / 2**20  # MB
ids = torch.arange(5, 25)[None]
warm = transformers.RobertaConfig(**config.to_dict() | {"num_hidden_layers": 1})
with torch.no_grad():
    small = transformers.RobertaModel(warm).eval()
    rk.patch(small, quantization=eval(sys.argv[1]), offload=eval(sys.argv[2]))
    small(ids)
    del small
    model(ids)
    before = resident()
    rk.patch(model, quantization=eval(sys.argv[1]), offload=eval(sys.argv[2]))
    model(ids)
    model(ids)
    inference = resident()
    rk.unpatch(model)
print((inference - before) / weights, (resident() - before) / weights)
"""


def resident_growth(quantization: str | None, offload: bool | None, folder: Any = None, layers: int = 6) -> list[float]:
    """In units of the layers' weights: what two calls of a patched model add to the process, and what is left of it
    after unpatch. folder: the model comes from there, by from_pretrained; None: it is made."""
    options = [repr(quantization), repr(offload), "" if folder is None else str(folder), str(layers)]
    out = subprocess.run([sys.executable, "-c", MEMORY, *options], check=True, capture_output=True, text=True).stdout
    return list(map(float, out.split()))
