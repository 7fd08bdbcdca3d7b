"""Models, tokenizers and texts from what a user names, with one line where that cannot be.

Importing this imports torch, transformers and the whole package, which takes seconds: commands do it when they run.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from transformers.utils import cached_file, logging

from roberta_kernels import api, backends, ray  # noqa: F401  # api first: it knows the order, and registers the attention
from roberta_kernels.backends import BackendError
from roberta_kernels.cli.console import INTERRUPTED, fail, first_line, say
from roberta_kernels.cli.options import Dtype, Task
from roberta_kernels.encoding import longest_input
from roberta_kernels.verification import VerificationError, complete_batch

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


def check_environment() -> None:
    """Ends the command, in one line, where an environment variable asks for a backend that is not there."""
    try:
        backends.check_environment()
    except BackendError as error:
        fail(first_line(error))


def sentences_of(sentence: list[str] | None, text: Path | None) -> list[str] | None:
    found = list(sentence or [])
    if text is not None:
        try:
            found += [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            fail(f"cannot read {text}: {first_line(error)}")
        if not found:
            fail(f"{text} has no text in it")
    return found or None


def quiet_transformers() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def use_threads(threads: int | None) -> None:
    """On a CPU; None: as many as torch takes by itself."""
    if threads is not None:
        torch.set_num_threads(threads)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        fail(f"no such device: {first_line(error)}")


def move(model: Any, device: str) -> None:
    place = _device(device)
    try:
        model.to(place)
    except (RuntimeError, AssertionError) as error:
        fail(f"cannot use device {device!r}: {first_line(error)}")


def load(path: str, task: Task, dtype: Dtype, unused: tuple[str, ...] = ()) -> tuple[Any, list[str]]:
    """The model of a folder or hub name, and what a reader of its figures should know about how it was loaded.

    unused: beginnings of the names of weights that will not be used, so that it does not matter where they are missing.
    """
    folder = Path(path).expanduser()
    # "a/b" may be a hub name; more of it, or a leading dot, slash or tilde, is a path.
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        fail(f"there is no folder {path}")
    if folder.is_file():
        fail(f"{path} is a file; name the folder that holds config.json and the weights")
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
        fail(f"cannot load {path}: {type(error).__name__}: {first_line(error)}")
    notes = []
    missing = sorted(name for name in info.get("missing_keys") or [] if not name.startswith(unused))
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        notes.append(f"{len(missing)} weights are not in the files and have random values: {shown}")
    return model, notes


@contextlib.contextmanager
def one_line_errors(output: str, *, continued: bool) -> Iterator[None]:
    """What an encoding can end in, as a line and an exit code. continued: whether one that is interrupted can be."""
    try:
        yield
    except KeyboardInterrupt:
        kept = "the same command continues it" if continued else "nothing is kept: its input was a pipe"
        say(f"interrupted; {kept}")
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, BackendError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or output}: {error.strerror or error}")


def load_for_encoding(path: str, dtype: Dtype, *, own_pooling: bool) -> tuple[Any, Any]:
    """A model and its tokenizer; a SentenceTransformer, which has its own, where its pooling is wanted."""
    if own_pooling and _is_sentence_transformer(path):
        return _load_sentence_transformer(path, dtype), None
    model, notes = load(path, Task.base, dtype, unused=("pooler.",))
    advice = f"save the model's own there: tokenizer.save_pretrained({path!r})"
    tokenizer = tokenizer_of(path, needed_for=f"texts; {advice}")
    for note in notes:
        say(f"note: {note}")
    return model, tokenizer


def encode_on_ray(
    path: str, model_dtype: Dtype, source: str, output: str, *, own_pooling: bool, **wanted: Any
) -> ray.RayReport:
    """roberta_kernels.ray.encode with the model of a folder or hub name. wanted: its options."""
    engine = ray.import_ray()  # before a model is loaded in vain
    load = functools.partial(load_for_encoding, path, model_dtype, own_pooling=own_pooling)
    try:
        return ray.encode(load, source, output, **wanted)
    except engine.exceptions.RayError as error:
        # Of an exception in a task Ray gives the whole way; that it ends in says what it is.
        errors = [line for line in str(error).splitlines() if re.match(r"[\w.]+(Error|Exception): ", line)]
        fail(f"Ray: {errors[0] if errors else first_line(error)}")


def _is_sentence_transformer(path: str) -> bool:
    """Whether a folder or hub name holds a SentenceTransformer, whose modules.json says what follows the encoder."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return (folder / "modules.json").is_file()
    try:
        return cached_file(path, "modules.json") is not None
    except (OSError, ValueError):
        return False


def _load_sentence_transformer(path: str, dtype: Dtype) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError:
        fail(
            f"{path} is a SentenceTransformer, with a pooling of its own: pip install sentence-transformers, "
            "or say which pooling (--pooling mean)"
        )
    folder = Path(path).expanduser()
    try:
        source = str(folder) if folder.is_dir() else path
        return SentenceTransformer(source, device="cpu", model_kwargs={"dtype": dtype.value})
    except Exception as error:
        fail(f"cannot load {path}: {type(error).__name__}: {first_line(error)}")


def tokenizer_of(path: str, *, needed_for: str | None) -> Any:
    """The model's tokenizer; None where it has none, and nothing needs one."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        # AutoTokenizer makes up an empty vocabulary for a folder without one.
        names = {file.name for file in folder.iterdir()}
        if not any(name.startswith(("tokenizer.", "vocab.", "sentencepiece", "spiece")) for name in names):
            if needed_for is not None:
                fail(f"{path} has no tokenizer, which is needed for {needed_for}")
            return None
    try:
        return transformers.AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else path)
    except Exception as error:
        fail(f"cannot load the tokenizer of {path}: {type(error).__name__}: {first_line(error)}")


def batch_of(model: Any, tokenizer: Any, sentences: list[str]) -> dict[str, Any]:
    if tokenizer.pad_token is None:
        fail("the tokenizer has no padding token")
    encoded = tokenizer(sentences, padding=True, truncation=True, max_length=longest_input(model), return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    highest, vocabulary = int(ids.max()), getattr(model.config, "vocab_size", None)
    if vocabulary is not None and highest >= vocabulary:
        fail(f"the tokenizer is not this model's: it gives token {highest}, and the model knows {vocabulary}")
    try:
        return complete_batch(model, ids, mask)
    except VerificationError as error:
        fail(str(error))
