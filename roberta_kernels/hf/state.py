"""What a patched model carries: its options, what was counted, and where a module keeps them.

Four entries of a module's `__dict__`, which only this file touches:

    _rk_state   PatchState, one for all modules of a patched model; a copy of the model gets a copy of it
    _rk_name    the module's name in the model, for the report
    _rk_memory  Memory: what was derived from the module and can be derived again; never copied, pickled or saved
    _rk_implementation  the attention implementation that a model had before patching, where that had to change
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import wraps
from typing import Any

import torch
from torch import nn

from roberta_kernels import backends, quantized
from roberta_kernels.backends import BackendError

# A fallback is said by logging, as transformers says its own: a warning would be an error under `python -W error`, and
# a call that works must not raise.
_NOTHING = contextlib.nullcontext()
logger = logging.getLogger("roberta_kernels")


@dataclass(frozen=True)
class Options:
    """How a model is to run, as `patch` takes it.

    padded_rows: "exact": what a caller may read at padded positions is what the original gives there. "zeros": padding
        is left out of every computation that can do without; zeros come back in its place, position 0 excepted.
    backend: "auto", or the backend to use for this model.
    quantization: None; or what a copy of the layers' weights is rounded to, for inference of a float32 model on a CPU:
        "bfloat16" (products accumulate in float32), "int8" (weights only), "int8-dynamic" (weights, and activations as
        they come). The answers are then no longer those of the original (`verify` measures them). Parameters, state
        dict and saved files stay float32; a call that cannot use the copy, as in training, runs the float32 weights,
        and the report's fallbacks say so.
    offload: whether weights that were copied leave memory for an unlinked file in the temporary directory (TMPDIR),
        mapped in their place; they read, train and save as before. None: yes, with `quantization`.
    return_logits: False: nobody reads the logits of a masked-language-model head that is given labels, or of one in a
        SparseEncoder. Its loss is then made without them, from the rows with a label alone, and they are None; the
        SparseEncoder's vectors are made without them, and features have no token_embeddings.
    cuda_graphs: True: inference on a GPU is recorded by bucket of batches, and replayed. "auto": where that was
        measured to be faster, which is nowhere yet. False: never.
    """

    padded_rows: str = "exact"
    backend: str = "auto"
    quantization: str | None = None
    offload: bool | None = None
    return_logits: bool = True
    cuda_graphs: str | bool = "auto"

    def __post_init__(self) -> None:
        if self.padded_rows not in ("exact", "zeros"):
            raise ValueError(f'padded_rows must be "exact" or "zeros", got {self.padded_rows!r}')
        if self.quantization not in (None, *quantized.QUANTIZATIONS):
            known = ", ".join(quantized.QUANTIZATIONS)
            raise ValueError(f"quantization must be None or one of {known}, got {self.quantization!r}")
        if self.offload is not None and not isinstance(self.offload, bool):
            raise ValueError(f"offload must be None, True or False, got {self.offload!r}")
        if not isinstance(self.return_logits, bool):
            raise ValueError(f"return_logits must be True or False, got {self.return_logits!r}")
        if self.cuda_graphs != "auto" and not isinstance(self.cuda_graphs, bool):
            raise ValueError(f'cuda_graphs must be "auto", True or False, got {self.cuda_graphs!r}')
        if self.quantization is not None and self.backend not in ("auto", "cpu"):
            raise ValueError(
                f"backend must be auto or cpu with quantization={self.quantization!r}, got {self.backend!r}"
            )

    @property
    def offloads(self) -> bool:
        return self.quantization is not None and self.offload is not False

    def check_available(self) -> None:
        """Raises BackendError where this process cannot do it."""
        with backends.backend(self.backend):
            pass
        reason = None if self.quantization is None else backends.missing_op("cpu", "packed_encoder")
        if reason is not None:
            raise BackendError(f"quantization={self.quantization!r} needs the compiled CPU kernels: {reason}")


def warn_of_former(kwargs: dict[str, Any]) -> None:
    """Options of former versions, taken out or translated in place, with a warning."""
    if "prepack" in kwargs:
        prepack = kwargs.pop("prepack")
        if not isinstance(prepack, bool):
            raise ValueError(f"prepack must be True or False, got {prepack!r}")
        warnings.warn("prepack has no effect any more: weights are read in place", FutureWarning, stacklevel=3)
    if "packed" in kwargs:
        packed = kwargs.pop("packed")
        if packed != "auto" and not isinstance(packed, bool):
            raise ValueError(f'packed must be "auto", True or False, got {packed!r}')
        rows = "zeros" if packed is True else "exact"
        if kwargs.setdefault("padded_rows", rows) != rows:
            raise ValueError(f"packed={packed!r} contradicts padded_rows={kwargs['padded_rows']!r}")
        warnings.warn(f'packed={packed!r} is now padded_rows="{rows}"', FutureWarning, stacklevel=3)
    if kwargs.get("offload") is True and kwargs.get("quantization") is None:
        warnings.warn("offload has no effect without quantization: no weight is copied", FutureWarning, stacklevel=3)


def takes_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose last parameter is `options: Options`, with the fields of Options as keywords in its place."""
    signature = inspect.signature(function)
    names = [f.name for f in fields(Options)]
    keywords = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(Options)
    ]

    @wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        warn_of_former(kwargs)
        unknown = [name for name in kwargs if name not in names and name not in signature.parameters]
        if unknown:
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument {unknown[0]!r}")
        options = Options(**{name: kwargs.pop(name) for name in names if name in kwargs})
        return function(*args, options=options, **kwargs)

    kept = [parameter for parameter in signature.parameters.values() if parameter.name != "options"]
    method.__signature__ = signature.replace(parameters=[*kept, *keywords])  # type: ignore[attr-defined]
    return method


@dataclass
class PatchState:
    """What `patch` was asked for, and what happened since: shared by the modules of one patched model.

    known_reader: whether what stands around the models, a pooling say, is known to leave padded rows alone.
    pools_logits: whether a SpladePooling is all that reads the logits of a masked-language-model head (sparse.py).
    fallbacks: (name of the module, its class, reason) -> calls in which it ran the original code. padded: reason ->
    calls in which a model ran fused, but on all rows of the padded batch. cost: of the calls that computed padded rows
    because somebody may read them, the rows, and those of them that were padding. graphs: what became of calls that
    were to be recorded and replayed. said: what was logged.
    """

    options: Options = field(default_factory=Options)
    known_reader: bool = False
    pools_logits: bool = False
    fallbacks: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    padded: Counter[str] = field(default_factory=Counter)
    cost: Counter[str] = field(default_factory=Counter)
    graphs: Counter[str] = field(default_factory=Counter)
    said: set[str] = field(default_factory=set)

    def fell_back(self, module: Any, reason: str, runs: str = "the original code runs") -> None:
        if torch.compiler.is_compiling():
            return
        key = (module.__dict__.get("_rk_name", ""), type(module).__name__, reason)
        self.fallbacks[key] += 1
        self._say(f"{key[1]}: {reason}", runs)

    def _say(self, what: str, runs: str) -> None:
        if what not in self.said:
            self.said.add(what)
            logger.warning("roberta_kernels: %s; %s (said once)", what, runs)

    def stayed_padded(self, reason: str) -> None:
        if not torch.compiler.is_compiling():
            self.padded[reason] += 1

    def computed_padding(self, module: Any, reason: str, rows: int, padding: int) -> None:
        """Of a call on all rows, `padding` of them padded, because padded rows differ and may be read."""
        self.cost += Counter(rows=rows, padding=padding)
        share = f"padding, {padding} of {rows} rows, is computed too"
        self._say(
            f"{type(module).__name__}: {reason}", f'{share}; if nobody reads it, padded_rows="zeros" leaves it out'
        )

    def reasons(self) -> dict[str, int]:
        """ "class: reason" -> calls of all modules of that class."""
        counts: Counter[str] = Counter()
        for (_, cls, reason), calls in self.fallbacks.items():
            counts[f"{cls}: {reason}"] += calls
        return dict(counts)


class Memory:
    """What a module keeps that can be derived again: a copy or a pickle of the module takes an empty one with it.

    owner: the id of that module: DataParallel's replicas get the same __dict__. survey: survey.Survey of a model.
    quantized: quantized.LayerCopies of a layer.
    """

    __slots__ = ("owner", "quantized", "survey")

    def __init__(self, owner: int | None = None) -> None:
        self.owner = owner
        self.survey: Any = None
        self.quantized: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, ()


def attach(module: nn.Module, state: PatchState) -> None:
    module.__dict__["_rk_state"] = state


def attach_name(module: nn.Module, name: str) -> None:
    module.__dict__["_rk_name"] = name


def attached(module: nn.Module) -> PatchState | None:
    """The state that a module has, or None."""
    return module.__dict__.get("_rk_state")


def state_of(module: Any) -> PatchState:
    return module.__dict__["_rk_state"]


def memory_of(module: Any) -> Memory:
    """The module's own, made when first asked for."""
    memory = module.__dict__.get("_rk_memory")
    if memory is None or memory.owner != id(module):
        memory = module.__dict__["_rk_memory"] = Memory(id(module))
    return memory


def drop_quantized(root: nn.Module) -> bool:
    """Frees the quantised weights of all layers under a module, and says whether there were any."""
    dropped = [memory.quantized.lose() for memory in _memories(root) if memory.quantized is not None]
    if any(dropped):
        _forget_routes(root)
    return any(dropped)


def refresh_quantized(root: nn.Module) -> None:
    """The same, and the next call makes new ones."""
    for memory in _memories(root):
        if memory.quantized is not None:
            memory.quantized.refresh()
    _forget_routes(root)


def _forget_routes(root: nn.Module) -> None:
    """Which have calls that hold the copies."""
    for memory in _memories(root):
        memory.survey = None


def _memories(root: nn.Module) -> list[Memory]:
    return [module.__dict__["_rk_memory"] for module in root.modules() if "_rk_memory" in module.__dict__]


def in_force(state: PatchState) -> contextlib.AbstractContextManager[Any]:
    """Puts the backend that the model was patched for in force, where another is: gradient checkpointing runs a layer
    again in backward, outside of its model's forward."""
    backend = state.options.backend
    if backend == "auto" or torch.compiler.is_compiling() or backend == backends.current_backend():
        return _NOTHING
    return backends.backend(backend)


def forget(module: nn.Module) -> None:
    """Undoes all that was derived: frees quantised weights, brings offloaded weights back into memory."""
    memory = module.__dict__.pop("_rk_memory", None)
    if memory is not None and memory.quantized is not None:
        memory.quantized.bring_back()


def keep_implementation(module: nn.Module, implementation: str) -> None:
    module.__dict__["_rk_implementation"] = implementation


def kept_implementation(module: nn.Module) -> str | None:
    return module.__dict__.get("_rk_implementation")


def detach(module: nn.Module) -> None:
    """Takes everything of ours from a module."""
    forget(module)
    for name in ("_rk_state", "_rk_name", "_rk_implementation"):
        module.__dict__.pop(name, None)
