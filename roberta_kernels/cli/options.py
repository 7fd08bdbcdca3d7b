"""The options of the commands, and the names that they take."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Task(str, Enum):
    auto = "auto"
    base = "base"
    masked_lm = "masked-lm"
    causal_lm = "causal-lm"
    sequence_classification = "sequence-classification"
    token_classification = "token-classification"
    question_answering = "question-answering"
    multiple_choice = "multiple-choice"


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Backend(str, Enum):
    auto = "auto"
    cuda = "cuda"
    triton = "triton"
    cpu = "cpu"
    reference = "reference"


class Quantization(str, Enum):
    none = "none"
    bfloat16 = "bfloat16"
    int8 = "int8"
    int8_dynamic = "int8-dynamic"


class Format(str, Enum):
    auto = "auto"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"


class Pooling(str, Enum):
    auto = "auto"
    mean = "mean"
    cls = "cls"
    max = "max"


class OutputDtype(str, Enum):
    float32 = "float32"
    float16 = "float16"


def value(choice: Enum) -> str | None:
    """What Python calls it; None for what leaves the choice open."""
    return None if choice.value in ("auto", "none") else choice.value


def _names(choices: type[Enum]) -> str:
    return ", ".join(choice.value for choice in choices)


def _named(choices: type[Enum], what: str) -> typer.models.OptionInfo:
    """An option that takes one of these names; `{}` in its help is where they are listed."""
    return typer.Option(metavar="NAME", help=what.format(_names(choices)))


# -- of several commands -----------------------------------------------------------------------------------------------

BackendOption = Annotated[Backend, _named(Backend, "The kernels to run: {}; auto: the fastest available here.")]
QuantizationOption = Annotated[
    Quantization, _named(Quantization, "Round the encoder's weights, of a float32 model on a CPU, to: {}.")
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: the GPU when there is one.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default what torch takes.")]

# -- of verify ---------------------------------------------------------------------------------------------------------

ModelArgument = Annotated[
    str, typer.Argument(metavar="PATH_OR_ID", help="A model folder, or the name of one on a hub.")
]
TaskOption = Annotated[Task, _named(Task, "Load it for this task: {}; auto: what its configuration names.")]
VerifyDtypeOption = Annotated[Dtype, _named(Dtype, "The dtype to run it in: {}; auto: that of its files.")]
SentenceOption = Annotated[list[str] | None, typer.Option(help="Run on this text; may be repeated.")]
TextOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Run on the lines of this file.")]
GradientsOption = Annotated[bool, typer.Option("--gradients", help="Verify the gradient of every parameter too.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print everything as JSON instead of a table.")]

# -- of demo -----------------------------------------------------------------------------------------------------------

DemoOutputOption = Annotated[Path, typer.Option(help="Where the pictures and summary.json go.")]
DemoModelOption = Annotated[
    str | None, typer.Option(metavar="PATH_OR_ID", help="Embed with this model instead of a random one.")
]
QuickOption = Annotated[bool, typer.Option("--quick", help="Small models, half a minute.")]
SeedOption = Annotated[int, typer.Option(help="Of the random weights, the masks and the batches.")]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Docstrings in a batch of the embedding part.")]
DemoDtypeOption = Annotated[
    Dtype, _named(Dtype, "Of the embedding part: {}; auto: bfloat16 on a GPU, float32 on a CPU.")
]
TrainingSecondsOption = Annotated[
    float | None, typer.Option(min=0, help="Train for so long; by default 85 s, in which a CPU learns a little.")
]

# -- of encode ---------------------------------------------------------------------------------------------------------

SourceArgument = Annotated[
    str,
    typer.Argument(metavar="IN", help="Texts: .txt (one a line), .jsonl or .parquet; with --ray also a folder or URI."),
]
OutputArgument = Annotated[
    str,
    typer.Argument(
        metavar="OUT", help="Embeddings, a row for each text: .npy or .parquet; with --ray a folder or URI."
    ),
]
ModelOption = Annotated[str, typer.Option(metavar="PATH_OR_ID", help="A model folder, or the name of one on a hub.")]
FormatOption = Annotated[Format, _named(Format, "Of IN: {}; auto: by its extension.")]
FieldOption = Annotated[str, typer.Option(help="The JSON field or Parquet column with the text.")]
PoolingOption = Annotated[
    Pooling, _named(Pooling, "Over a text's tokens: {}; auto: a SentenceTransformer's own, else mean.")
]
NormalizeOption = Annotated[
    bool | None,
    typer.Option(
        "--normalize/--no-normalize",
        help="Divide each embedding by its length; by default with --pooling auto as a SentenceTransformer does.",
    ),
]
OutputDtypeOption = Annotated[OutputDtype, _named(OutputDtype, "Of the embeddings: {}.")]
EncodeDtypeOption = Annotated[Dtype, _named(Dtype, "The dtype to run in: {}; auto: that of the files.")]
MaxLengthOption = Annotated[
    int | None, typer.Option(min=1, help="Tokens; longer texts are truncated. By default what the model takes.")
]
BatchTokensOption = Annotated[
    int | None, typer.Option(min=1, help="Tokens in a batch. By default 2048 on a CPU, 32768 on a GPU.")
]
WindowOption = Annotated[
    int | None, typer.Option(min=1, help="Texts sorted by length together; bounds the memory. By default 8192.")
]
OriginalOption = Annotated[bool, typer.Option("--original", help="Run the model's own code, not the kernels.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT, and begin again where a run was interrupted.")
]
RayOption = Annotated[
    str | None,
    typer.Option(
        metavar="[ADDRESS]",
        help="Run on a Ray cluster: at this address, else the one that Ray finds, else one that is started here.",
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option(min=1, help="With --ray: how many, each with a model and --threads CPUs (one by default).")
]
GpusPerWorkerOption = Annotated[
    float | None, typer.Option(min=0, help="With --ray: GPUs of each worker; by default 0.")
]
ReportJsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")]
