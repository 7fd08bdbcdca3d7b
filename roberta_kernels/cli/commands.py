"""The commands themselves. torch, transformers and the rest of the package are imported by the command that needs them
(loading.py, before any other part), so that help is there at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperCommand

from roberta_kernels._version import __version__
from roberta_kernels.cli import options
from roberta_kernels.cli.console import BROKEN, err, fail, first_line, interruptible, out
from roberta_kernels.cli.options import Backend, Dtype, Format, OutputDtype, Pooling, Quantization, Task

app = typer.Typer(
    help="Fused kernels that make any Hugging Face RoBERTa-family model faster, with the same answers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


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
    """What is installed here, which kernels are available, and why the others are not."""
    from roberta_kernels.cli import loading

    loading.check_environment()
    from roberta_kernels.cli.environment import show

    show()


@app.command()
def verify(
    model: options.ModelArgument,
    dtype: options.VerifyDtypeOption = Dtype.auto,
    backend: options.BackendOption = Backend.auto,
    quantization: options.QuantizationOption = Quantization.none,
    task: options.TaskOption = Task.auto,
    sentence: options.SentenceOption = None,
    text: options.TextOption = None,
    gradients: options.GradientsOption = False,
    device: options.DeviceOption = "auto",
    as_json: options.JsonOption = False,
) -> None:
    """Does the promise hold for THIS model? Original and patched, side by side, against a float64 original.

    The batch is your text, or some sentences in many languages when the model has a tokenizer, or random token ids. The
    exit code is 0 when the promise holds and 1 when it is broken.
    """
    from roberta_kernels.cli import loading

    loading.check_environment()

    sentences = loading.sentences_of(sentence, text)
    loading.quiet_transformers()
    loaded, notes = loading.load(model, task, dtype)
    loading.move(loaded, device)
    advice = "leave the text out to run on random token ids"
    tokenizer = loading.tokenizer_of(model, needed_for=None if sentences is None else f"text; {advice}")
    batch = None if tokenizer is None else loading.batch_of(loaded, tokenizer, sentences or list(loading.SENTENCES))
    from roberta_kernels import verification

    try:
        with interruptible():
            report = verification.verify(
                loaded, batch, backend=backend.value, quantization=options.value(quantization), gradients=gradients
            )
    except (verification.VerificationError, loading.BackendError) as error:
        fail(str(error))
    if as_json:
        typer.echo(json.dumps({**report.as_dict(), "notes": [*notes, *report.notes]}, indent=2))
    else:
        for note in notes:
            out.print(Text(f"note: {note}", "yellow"))
        out.print(report)
    if not report.holds:
        raise typer.Exit(BROKEN)


@app.command()
def demo(
    output: options.DemoOutputOption = Path("demo-output"),
    model: options.DemoModelOption = None,
    quick: options.QuickOption = False,
    seed: options.SeedOption = 0,
    batch_size: options.BatchSizeOption = 16,
    threads: options.ThreadsOption = None,
    dtype: options.DemoDtypeOption = Dtype.auto,
    training_seconds: options.TrainingSecondsOption = None,
) -> None:
    """Embeds real text and trains a model, original against patched, with no download: about four minutes on two cores.

    The text is the docstrings of Python's own standard library. The exit code is 1 when an answer differs by more than
    rounding explains.
    """
    try:
        import matplotlib  # noqa: F401
        import tokenizers  # noqa: F401
    except ModuleNotFoundError as error:
        fail(f"the demo needs {error.name}: pip install roberta_kernels[demo]")
    from roberta_kernels.cli import loading

    loading.check_environment()

    loading.quiet_transformers()
    from roberta_kernels import demo as show

    tokenizer = embedder = None
    if model is not None:
        embedder, notes = loading.load(model, Task.base, dtype)
        tokenizer = loading.tokenizer_of(model, needed_for="the text of the demo")
        for note in notes:
            out.print(Text(f"note: {note}", "yellow"))
    loading.use_threads(threads)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot write to {output}: {first_line(error)}")
    wanted = show.Options(
        output, quick=quick, seed=seed, batch_size=batch_size, dtype=dtype.value, training_seconds=training_seconds
    )
    try:
        with interruptible():
            holds = show.run(wanted, out, model=embedder, tokenizer=tokenizer)
    except show.DemoError as error:
        fail(str(error))
    if not holds:
        raise typer.Exit(BROKEN)


class _RayAddressIsOptional(TyperCommand):
    """`--ray` takes the word after it where there is one that is no option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        place = args.index("--ray") if "--ray" in args else None
        if place is not None and (place + 1 == len(args) or args[place + 1].startswith("-")):
            args = [*args[:place], "--ray", "", *args[place + 1 :]]
        return super().parse_args(ctx, args)


@app.command(cls=_RayAddressIsOptional)
def encode(
    source: options.SourceArgument,
    output: options.OutputArgument,
    model: options.ModelOption,
    format: options.FormatOption = Format.auto,
    field: options.FieldOption = "text",
    pooling: options.PoolingOption = Pooling.auto,
    normalize: options.NormalizeOption = None,
    output_dtype: options.OutputDtypeOption = OutputDtype.float32,
    dtype: options.EncodeDtypeOption = Dtype.auto,
    max_length: options.MaxLengthOption = None,
    batch_tokens: options.BatchTokensOption = None,
    window: options.WindowOption = None,
    backend: options.BackendOption = Backend.auto,
    quantization: options.QuantizationOption = Quantization.none,
    original: options.OriginalOption = False,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    overwrite: options.OverwriteOption = False,
    as_json: options.ReportJsonOption = False,
    ray: options.RayOption = None,
    workers: options.WorkersOption = None,
    gpus_per_worker: options.GpusPerWorkerOption = None,
) -> None:
    """Embeds a corpus of any size: a row of OUT for each line of IN, in the same order, in bounded memory.

    A line that cannot be read becomes a row of NaN (null in Parquet), and OUT.errors.jsonl says why; the exit code is
    still 0, unless no line can be read. Interrupted, the same command goes on where it was (OUT.state.json,
    OUT.partial) and gives the same file. IN may be a pipe (/dev/stdin, with --format), which cannot be continued.

    With --ray, after IN and OUT, IN may be a folder, OUT is a folder of Parquet partitions, and both may be URIs that
    fsspec knows. Partitions that are there and whole are kept; a line that cannot be read says why in the column error.
    """
    from roberta_kernels.cli import loading

    loading.check_environment()
    if ray is None and (workers is not None or gpus_per_worker is not None):
        fail("--workers and --gpus-per-worker are options of a run with --ray")

    loading.quiet_transformers()
    from roberta_kernels import encoding

    own_pooling = pooling is Pooling.auto
    wanted: dict[str, Any] = {
        "pooling": options.value(pooling),
        "normalize": normalize,
        "dtype": output_dtype.value,
        "max_length": max_length,
        "batch_tokens": batch_tokens,
        "window": window or encoding.WINDOW,
        "format": options.value(format),
        "field": field,
        "patch": not original,
        "backend": backend.value,
        "quantization": options.value(quantization),
        "overwrite": overwrite,
        "progress": err.is_terminal,
    }
    report: Any
    if ray is not None:
        wanted |= {"workers": workers or 1, "gpus_per_worker": gpus_per_worker or 0, "threads": threads or 1}
        with loading.one_line_errors(output, continued=True), interruptible():
            report = loading.encode_on_ray(
                model, dtype, source, output, own_pooling=own_pooling, address=ray or None, device=device, **wanted
            )
    else:
        path = Path(source)
        with loading.one_line_errors(output, continued=path.is_file()):
            encoding.check_output(Path(output))
            encoding.check_source(path, options.value(format))
            loaded, tokenizer = loading.load_for_encoding(model, dtype, own_pooling=own_pooling)
            loading.use_threads(threads)
            loading.move(loaded, device)
            with interruptible():
                report = encoding.encode(loaded, tokenizer, path, Path(output), **wanted)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        out.print(report)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Runs the benchmarks of a source checkout; options go to `python -m benchmarks`."""
    checkout = Path(__file__).resolve().parent.parent.parent
    if not (checkout / "benchmarks" / "__main__.py").is_file():
        fail("the benchmarks are not part of an installed package: run this in a source checkout (pip install -e .)")
    with interruptible():
        raise typer.Exit(subprocess.call([sys.executable, "-m", "benchmarks", *context.args], cwd=checkout))
