"""Inference engines that run an exported model: ONNX Runtime and OpenVINO, as peers on a CPU.

`python -m benchmarks.engines FOLDER` writes the model of a run into FOLDER, in a process of its own, as exporting
leaves a gigabyte behind: `model.onnx`; `fused.onnx`, after ONNX Runtime's transformer optimiser (Attention,
SkipLayerNorm and BiasGelu nodes); `int8.onnx`, that one with dynamically quantised weights, per channel.

Importing this module imports neither torch nor an engine: a process that measures memory has only what it needs.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# {"input_ids": [B, S] int64, "attention_mask": [B, S] int64} -> hidden states, [B, S, H] float32.
Session = Callable[[dict[str, np.ndarray]], np.ndarray]

INPUTS = ("input_ids", "attention_mask")
OUTPUT = "last_hidden_state"


@dataclass(frozen=True)
class Engine:
    """file: of the export. start: (its path, threads) -> what is called. packages: what has to be installed."""

    file: str
    start: Callable[[Path, int], Session]
    packages: tuple[str, ...]
    note: str
    weights: str | None = None  # how they are kept, where not in float32
    arithmetic: str | None = None  # what products take, where not float32

    def missing(self) -> str:
        """Why it cannot be measured here, or ""."""
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if not absent:
            return ""
        return f"not installed: {', '.join(absent)} (pip install '.[bench-models]')"


def _onnxruntime(path: Path, threads: int) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda arguments: session.run(None, arguments)[0]


def _openvino(path: Path, threads: int, precision: str = "f32") -> Session:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": precision,  # it would take bfloat16 where the CPU has it
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda arguments: compiled(arguments, share_inputs=True, share_outputs=True)[0]


ENGINES = {
    "ONNX Runtime": Engine(
        "fused.onnx",
        _onnxruntime,
        ("onnx", "onnxruntime"),
        "exported, and fused by onnxruntime.transformers' optimiser for BERT",
    ),
    "OpenVINO": Engine("model.onnx", _openvino, ("onnx", "openvino"), "the same export, precision set to float32"),
    "ONNX Runtime int8": Engine(
        "int8.onnx",
        _onnxruntime,
        ("onnx", "onnxruntime"),
        "the fused model, dynamically quantised, weights per channel",
        weights="int8",
        arithmetic="int8",
    ),
    "OpenVINO bfloat16": Engine(
        "model.onnx",
        functools.partial(_openvino, precision="bf16"),
        ("onnx", "openvino"),
        "the same export, precision set to bfloat16",
        weights="bfloat16",
        arithmetic="bfloat16",
    ),
}


# -- export -----------------------------------------------------------------------------------------------------------


def _register_attention() -> str:
    """Attention as ONNX Runtime's optimiser knows it: scores are divided, and the mask is a sum's second operand."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any
    ) -> tuple[Any, None]:
        scores = torch.matmul(query, key.transpose(2, 3)) / (1.0 / scaling) + attention_mask
        return torch.matmul(torch.softmax(scores, -1), value).transpose(1, 2).contiguous(), None

    AttentionInterface.register("fusable", attention)
    AttentionMaskInterface.register("fusable", eager_mask)
    return "fusable"


def export(folder: Path, *, smoke: bool) -> None:
    """Writes what the installed engines need into folder."""
    import onnx
    import torch

    from benchmarks.models import original

    class Exported(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = original("cpu", torch.float32, smoke=smoke, attention=_register_attention())

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            masked = 1.0 - attention_mask.unsqueeze(1).unsqueeze(2).float()
            return self.model(
                input_ids=input_ids, attention_mask=masked * torch.finfo(torch.float32).min
            ).last_hidden_state

    exported = Exported().eval()
    ids = torch.full((2, 7), 5)
    path = folder / "model.onnx"
    # By tracing: what the other exporter makes of the mask is not recognised, and no attention is fused.
    torch.onnx.export(
        exported,
        (ids, torch.ones_like(ids)),
        str(path),
        input_names=list(INPUTS),
        output_names=[OUTPUT],
        dynamic_axes={name: {0: "batch", 1: "sequence"} for name in (*INPUTS, OUTPUT)},
        opset_version=17,
        dynamo=False,
    )
    if ENGINES["ONNX Runtime"].missing():
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    config = exported.model.config
    heads, width, layers = config.num_attention_heads, config.hidden_size, config.num_hidden_layers
    fused = optimizer.optimize_model(str(path), model_type="bert", num_heads=heads, hidden_size=width, opt_level=0)
    found = fused.get_fused_operator_statistics()
    expected = {"Attention": layers, "BiasGelu": layers, "SkipLayerNormalization": 2 * layers}
    if any(found.get(name) != count for name, count in expected.items()):
        raise RuntimeError(f"the optimiser fused {found}, where {expected} was expected: no fair peer")
    fused.save_model_to_file(str(folder / "fused.onnx"))
    quantize_dynamic(
        str(folder / "fused.onnx"),
        str(folder / "int8.onnx"),
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # fused nodes have no shape inference
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # tracing warns of every Python number that becomes a constant
    logging.getLogger().setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    export(arguments.folder, smoke=arguments.smoke)
    return 0


if __name__ == "__main__":
    sys.exit(main())
