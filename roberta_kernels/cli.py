"""The command `roberta-kernels`: what is here, a demo, does the promise hold for a model, a corpus into
embeddings, and the benchmarks.

Exit codes: 0 all is well; 1 the promise is broken; 2 the request cannot be carried out (one line says why);
130 interrupted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from roberta_kernels import __version__, backends
from roberta_kernels.backends import choosing

BROKEN, BAD_REQUEST, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    help="Fused kernels that make any Hugging Face RoBERTa-family model faster, with the same answers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)

# Short and long, and as many scripts as fit: what a tokenizer splits finely makes the long rows.
SENTENCES = (
    "Hello.",
    "The ferry to the islands leaves at seven in the morning, except on Sundays and in bad weather.",
    "Der Zug nach Freiburg hat heute leider zwanzig Minuten Verspätung.",
    "Où se trouve la bibliothèque ?",
    "Σήμερα έχει πολύ καλό καιρό, με ήρεμη θάλασσα.",
    "Поезд прибывает на вторую платформу через пять минут.",
    "يصل القطار إلى المحطة بعد خمس دقائق.",
    "आज मौसम बहुत अच्छा है।",
    "图书馆周一不开放。",
    "図書館は月曜日に閉まっています。",
    "Yes",
    "A library is a collection of books, and possibly other materials and media, that is accessible for use by its "
    "members and members of allied institutions; it provides physical or digital materials, and may be a physical "
    "location, a virtual space, or both, and its collection normally includes printed materials which can be borrowed, "
    "and usually also a reference section of publications which may only be used inside the premises.",
)

_AUTO_CLASSES = {
    "base": "AutoModel",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
}


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


def _names(choices: type[Enum]) -> str:
    return ", ".join(choice.value for choice in choices)


_BACKEND_HELP = f"The kernels to run: {_names(Backend)}; auto: those that serve here."
_QUANTIZATION_HELP = f"Round the encoder's weights, of a float32 model on a CPU, to: {_names(Quantization)}."
_TASK_HELP = f"Load it for this task: {_names(Task)}; auto: what its configuration names."


def _fail(message: str) -> NoReturn:
    err.print(Text("error: ", "bold red") + Text(" ".join(message.split())))
    raise typer.Exit(BAD_REQUEST)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"roberta_kernels {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def env() -> None:
    """What is installed here, which kernels can serve, and why the others cannot."""

    def version_of(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    versions = Table(box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    versions.add_row("roberta_kernels", __version__)
    versions.add_row("Python", ".".join(map(str, sys.version_info[:3])))
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    versions.add_row("torch", f"{torch.__version__} ({cuda})")
    for package in ("transformers", "triton"):
        versions.add_row(package, version_of(package))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            capability = f"compute capability {gpu.major}.{gpu.minor}"
            versions.add_row(f"GPU {i}", f"{gpu.name}, {capability}, {gpu.total_memory / 2**30:.0f} GiB")
    else:
        versions.add_row("GPU", "none that torch can use")
    versions.add_row("CPU", f"{torch.get_num_threads()} threads; {torch.backends.cpu.get_cpu_capability()} for torch")
    out.print(versions)

    table = Table("backend", "serves", "detail", box=SIMPLE_HEAD, pad_edge=False)
    for name, status in backends.available_backends().items():
        table.add_row(name, Text("yes", "green") if status else Text("no", "yellow"), Text(status.detail))
    out.print(table)
    wish = os.environ.get(backends.ENVIRONMENT_VARIABLE)
    out.print(f"asked for: {backends.current_backend()}" + (f" ({backends.ENVIRONMENT_VARIABLE})" if wish else ""))
    out.print(f"float32 on the CPU is served by: {backends.serving(torch.empty(0))}")
    if torch.cuda.is_available():
        served = backends.serving(torch.empty(0, device="cuda", dtype=torch.bfloat16))
        out.print(f"bfloat16 on the GPU is served by: {served}")

    table = Table("op", "GPU", "dtype", "size", "backend", "from", box=SIMPLE_HEAD, pad_edge=False)
    for row in backends.choices():
        cells = (row[key] for key in ("op", "architecture", "dtype", "size", "backend", "from"))
        table.add_row(*(Text(cell, "bold" if row["here"] else "") for cell in cells))
    out.print("on NVIDIA GPUs, sizes in tokens (attention: of the longest sequence):")
    out.print(table)
    for op in choosing.VARIANTS:
        if (variant := backends.cuda_variant(op)) is not None:
            out.print(f"variant of {op} in the CUDA library: {variant}")

    report = backends.build_report()
    if not report:
        out.print("build: no report; nothing was compiled when this was installed")
        return
    build = Table("build", "", box=SIMPLE_HEAD, pad_edge=False)
    for key, value in report.items():
        build.add_row(key, Text(", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    out.print(build)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(metavar="PATH_OR_ID", help="A model folder, or the name of one on a hub.")],
    dtype: Annotated[
        Dtype, typer.Option(metavar="NAME", help=f"The dtype to run it in: {_names(Dtype)}; auto: that of its files.")
    ] = Dtype.auto,
    backend: Annotated[Backend, typer.Option(metavar="NAME", help=_BACKEND_HELP)] = Backend.auto,
    quantization: Annotated[Quantization, typer.Option(metavar="NAME", help=_QUANTIZATION_HELP)] = Quantization.none,
    task: Annotated[Task, typer.Option(metavar="NAME", help=_TASK_HELP)] = Task.auto,
    sentence: Annotated[list[str] | None, typer.Option(help="Run on this text; may be repeated.")] = None,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Run on the lines of this file.")] = None,
    gradients: Annotated[bool, typer.Option("--gradients", help="Verify the gradient of every parameter too.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: the GPU when there is one.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead of a table.")] = False,
) -> None:
    """Does the promise hold for THIS model? Original and patched, side by side, against a float64 original.

    The batch is your text, or some sentences in many languages when the model has a tokenizer, or random token ids. The
    exit code is 0 when the promise holds and 1 when it is broken.
    """
    sentences = _sentences(sentence, text)
    _quiet_transformers()
    loaded, notes = _load(model, task, dtype)
    _move(loaded, device)
    tokenizer = _tokenizer(model, required=sentences is not None)
    batch = _batch(loaded, tokenizer, sentences or list(SENTENCES)) if tokenizer is not None else None

    from roberta_kernels.verification import VerificationError
    from roberta_kernels.verification import verify as run

    try:
        report = run(
            loaded, batch, backend=backend.value, quantization=_quantization(quantization), gradients=gradients
        )
    except (VerificationError, backends.BackendError) as error:
        _fail(str(error))
    if as_json:
        typer.echo(json.dumps({**report.as_dict(), "notes": [*notes, *report.notes]}, indent=2))
    else:
        for note in notes:
            out.print(Text(f"note: {note}", "yellow"))
        out.print(report)
    if not report.holds:
        raise typer.Exit(BROKEN)


def _quantization(choice: Quantization) -> str | None:
    return None if choice is Quantization.none else choice.value


def _sentences(sentence: list[str] | None, text: Path | None) -> list[str] | None:
    found = list(sentence or [])
    if text is not None:
        try:
            found += [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            _fail(f"cannot read {text}: {_first_line(error)}")
        if not found:
            _fail(f"{text} has no text in it")
    return found or None


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        _fail(f"no such device: {_first_line(error)}")


def _move(model: Any, device: str) -> None:
    place = _device(device)
    try:
        model.to(place)
    except (RuntimeError, AssertionError) as error:
        _fail(f"cannot use device {device!r}: {_first_line(error)}")


def _load(path: str, task: Task, dtype: Dtype, unused: tuple[str, ...] = ()) -> tuple[Any, list[str]]:
    """The model of a folder or hub name, and what a reader of its figures should know about how it was loaded.

    unused: beginnings of the names of weights that will not be used, so that it does not matter where they are missing.
    """
    import transformers

    folder = Path(path).expanduser()
    # "a/b" may be a hub name; more of it, or a leading dot, slash or tilde, is a path.
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        _fail(f"there is no folder {path}")
    if folder.is_file():
        _fail(f"{path} is a file; name the folder that holds config.json and the weights")
    source = str(folder) if folder.is_dir() else path
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        loader: Any = None
        if task is not Task.auto:
            loader = getattr(transformers, _AUTO_CLASSES[task.value])
        else:
            for name in getattr(config, "architectures", None) or []:
                # The drop-in classes are saved under their namesake's name, so this finds those too.
                loader = getattr(transformers, name, None)
                break
            loader = loader or transformers.AutoModel
        model, info = loader.from_pretrained(source, dtype=dtype.value, output_loading_info=True)
    except Exception as error:  # whatever a damaged folder can cause: one line is what helps
        _fail(f"cannot load {path}: {type(error).__name__}: {_first_line(error)}")
    notes = []
    missing = sorted(name for name in info.get("missing_keys") or [] if not name.startswith(unused))
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        notes.append(f"{len(missing)} weights are not in the files and have random values: {shown}")
    return model, notes


def _is_sentence_transformer(path: str) -> bool:
    """Whether a folder or hub name holds a SentenceTransformer, whose modules.json says what follows the encoder."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return (folder / "modules.json").is_file()
    from transformers.utils import cached_file

    try:
        return cached_file(path, "modules.json") is not None
    except (OSError, ValueError):
        return False


def _load_sentence_transformer(path: str, dtype: Dtype) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError:
        _fail(
            f"{path} is a SentenceTransformer, with a pooling of its own: pip install sentence-transformers, "
            "or say which pooling (--pooling mean)"
        )
    folder = Path(path).expanduser()
    try:
        source = str(folder) if folder.is_dir() else path
        return SentenceTransformer(source, device="cpu", model_kwargs={"dtype": dtype.value})
    except Exception as error:
        _fail(f"cannot load {path}: {type(error).__name__}: {_first_line(error)}")


def _tokenizer(path: str, *, required: bool) -> Any:
    """The model's tokenizer, or None where it has none and none is needed."""
    import transformers

    folder = Path(path).expanduser()
    if folder.is_dir():
        # AutoTokenizer makes up an empty vocabulary for a folder without one.
        names = {file.name for file in folder.iterdir()}
        if not any(name.startswith(("tokenizer.", "vocab.", "sentencepiece", "spiece")) for name in names):
            if required:
                _fail(f"{path} has no tokenizer, and text needs one; leave the text out to run on random token ids")
            return None
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else path)
    except Exception as error:
        _fail(f"cannot load the tokenizer of {path}: {type(error).__name__}: {_first_line(error)}")


def _batch(model: Any, tokenizer: Any, sentences: list[str]) -> dict[str, Any]:
    from roberta_kernels.encoding import longest_input
    from roberta_kernels.verification import VerificationError, complete_batch

    if tokenizer.pad_token is None:
        _fail("the tokenizer has no padding token")
    encoded = tokenizer(sentences, padding=True, truncation=True, max_length=longest_input(model), return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    highest, vocabulary = int(ids.max()), getattr(model.config, "vocab_size", None)
    if vocabulary is not None and highest >= vocabulary:
        _fail(f"the tokenizer is not this model's: it gives token {highest}, and the model knows {vocabulary}")
    try:
        return complete_batch(model, ids, mask)
    except VerificationError as error:
        _fail(str(error))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the pictures and summary.json go.")] = Path("demo-output"),
    model: Annotated[
        str | None, typer.Option(metavar="PATH_OR_ID", help="Embed with this model instead of a random one.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small models, half a minute.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random weights, the masks and the batches.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Docstrings in a batch of the embedding part.")] = 16,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default what torch takes.")] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(
            metavar="NAME", help=f"Of the embedding part: {_names(Dtype)}; auto: bfloat16 on a GPU, float32 on a CPU."
        ),
    ] = Dtype.auto,
    training_seconds: Annotated[
        float | None, typer.Option(min=0, help="Train for so long; by default 85 s, in which a CPU learns a little.")
    ] = None,
) -> None:
    """Embeds real text and trains a model, original against patched, with no download: about four minutes on two cores.

    The text is the docstrings of Python's own standard library. The exit code is 1 when an answer differs by more than
    rounding explains.
    """
    try:
        import matplotlib  # noqa: F401
        import tokenizers  # noqa: F401
    except ModuleNotFoundError as error:
        _fail(f"the demo needs {error.name}: pip install roberta_kernels[demo]")
    from roberta_kernels import demo as show

    _quiet_transformers()
    tokenizer = embedder = None
    if model is not None:
        embedder, notes = _load(model, Task.base, dtype)
        tokenizer = _tokenizer(model, required=True)
        for note in notes:
            out.print(Text(f"note: {note}", "yellow"))
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _fail(f"cannot write to {output}: {_first_line(error)}")
    options = show.Options(
        output, quick=quick, seed=seed, batch_size=batch_size, dtype=dtype.value, training_seconds=training_seconds
    )
    try:
        holds = show.run(options, out, model=embedder, tokenizer=tokenizer)
    except show.DemoError as error:
        _fail(str(error))
    if not holds:
        raise typer.Exit(BROKEN)


@app.command()
def encode(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Texts: .txt (one a line), .jsonl or .parquet.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Embeddings, a row for each text: .npy or .parquet.")],
    model: Annotated[str, typer.Option(metavar="PATH_OR_ID", help="A model folder, or the name of one on a hub.")],
    format: Annotated[
        Format, typer.Option(metavar="NAME", help=f"Of IN: {_names(Format)}; auto: by its extension.")
    ] = Format.auto,
    field: Annotated[str, typer.Option(help="The JSON field or Parquet column with the text.")] = "text",
    pooling: Annotated[
        Pooling,
        typer.Option(
            metavar="NAME",
            help=f"Over a text's tokens: {_names(Pooling)}; auto: a SentenceTransformer's own, else mean.",
        ),
    ] = Pooling.auto,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize",
            help="Divide each embedding by its length; by default with --pooling auto as a SentenceTransformer does.",
        ),
    ] = None,
    output_dtype: Annotated[
        OutputDtype, typer.Option(metavar="NAME", help=f"Of the embeddings: {_names(OutputDtype)}.")
    ] = OutputDtype.float32,
    dtype: Annotated[
        Dtype, typer.Option(metavar="NAME", help=f"The dtype to run in: {_names(Dtype)}; auto: that of the files.")
    ] = Dtype.auto,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens; longer texts are truncated. By default what the model takes.")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a batch. By default 2048 on a CPU, 32768 on a GPU.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Texts sorted by length together; bounds the memory. By default 8192.")
    ] = None,
    backend: Annotated[Backend, typer.Option(metavar="NAME", help=_BACKEND_HELP)] = Backend.auto,
    quantization: Annotated[Quantization, typer.Option(metavar="NAME", help=_QUANTIZATION_HELP)] = Quantization.none,
    original: Annotated[bool, typer.Option("--original", help="Run the model's own code, not the kernels.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: the GPU when there is one.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default what torch takes.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, and begin again where a run was interrupted.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
) -> None:
    """Embeds a corpus of any size: a row of OUT for each line of IN, in the same order, in bounded memory.

    A line that cannot be read becomes a row of NaN (null in Parquet), and OUT.errors.jsonl says why; the exit code is
    still 0. Interrupted, the same command goes on where it was (OUT.state.json, OUT.partial) and gives the same file.
    """
    from roberta_kernels import encoding

    _quiet_transformers()
    try:
        encoding.format_of(source, None if format is Format.auto else format.value)
        encoding.check_output(output)
        source.open("rb").close()
        notes: list[str] = []
        tokenizer = None
        if pooling is Pooling.auto and _is_sentence_transformer(model):
            loaded = _load_sentence_transformer(model, dtype)
        else:
            loaded, notes = _load(model, Task.base, dtype, unused=("pooler.",))
            tokenizer = _tokenizer(model, required=True)
        if threads is not None:
            torch.set_num_threads(threads)
        _move(loaded, device)
        for note in notes:
            err.print(Text(f"note: {note}", "yellow"))
        report = encoding.encode(
            loaded,
            tokenizer,
            source,
            output,
            pooling=None if pooling is Pooling.auto else pooling.value,
            normalize=normalize,
            dtype=output_dtype.value,
            max_length=max_length,
            batch_tokens=batch_tokens,
            window=window or encoding.WINDOW,
            format=None if format is Format.auto else format.value,
            field=field,
            patch=not original,
            backend=backend.value,
            quantization=_quantization(quantization),
            overwrite=overwrite,
            progress=err.is_terminal,
        )
    except KeyboardInterrupt:
        err.print(Text("interrupted; the same command continues it", "yellow"))
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, backends.BackendError) as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or output}: {error.strerror or error}")
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        out.print(report)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Runs the benchmarks of a source checkout; options go to `python -m benchmarks`."""
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        _fail("the benchmarks are not part of an installed package: run this in a source checkout (pip install -e .)")
    raise typer.Exit(subprocess.call([sys.executable, "-m", "benchmarks", *context.args], cwd=checkout))


def main() -> None:
    try:
        backends.check_environment()
    except backends.BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(BAD_REQUEST) from None
    app()
