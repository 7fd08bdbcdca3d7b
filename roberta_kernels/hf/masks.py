"""What travels through Hugging Face's own code in the place of an attention mask.

A head that leaves padded rows alone hands its base model RealRows; a model in the padded layout hands its own
`_create_attention_masks` a Handover, which gives the layers a LayerMask. Each is found by its type, wherever in a call
it stands and whatever its argument is called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from roberta_kernels.unpadding import Sequences


@dataclass(frozen=True, slots=True, eq=False)
class RealRows:
    """The caller's attention mask, and that nobody reads padded rows but position 0 of a sequence.

    returned: what is made of them goes back to the caller all the same, so that they are exact where that is cheap.
    unless: a bool tensor of no dimension, True where they are read after all: whoever reads the mask reads it too.
    """

    attention_mask: Any
    returned: bool = False
    unless: Any = None

    def size(self, dim: int) -> int:
        return self.attention_mask.size(dim)

    def view(self, *shape: int) -> RealRows:
        """What a multiple-choice head does with its mask, on the way to its base model."""
        return replace(self, attention_mask=self.attention_mask.view(*shape))

    def __eq__(self, other: object) -> Any:
        """What ELECTRA's pretraining loss does with it."""
        return self.attention_mask == other

    __hash__ = object.__hash__


BESIDE = "roberta_kernels_sequences"  # the keyword under which a LayerMask comes to layers whose mask stays theirs


@dataclass(frozen=True, slots=True, eq=False)
class LayerMask:
    """What a layer gets of a model that runs fused.

    sequences: which rows belong together. choices: id of a layer -> its LayerChoice; None where each
    layer looks again (route.Padded). vetted: values that the model's caller gave and that change nothing in a
    layer. make_original: makes the mask that the original code would have got; None in the unpadded layout, which is
    taken only where every layer runs fused.
    """

    sequences: Sequences
    choices: dict[int, Any] | None
    vetted: tuple[Any, ...] = ()
    make_original: Callable[[], Any] | None = None

    def original(self) -> Any:
        assert self.make_original is not None
        return self.make_original()

    def unknown(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """What of a layer's arguments is neither empty, this mask nor vetted, or None."""
        for position, value in enumerate(args):
            if not self._known(value):
                return f"argument {position + 2}"
        for name, value in kwargs.items():
            if not self._known(value):
                return name
        return None

    def _known(self, value: Any) -> bool:
        if value is None or value is False or value is self:
            return True
        return any(value is vetted for vetted in self.vetted)


@dataclass(frozen=True, slots=True, eq=False)
class Handover:
    """The caller's mask on its way through a model's original forward, and what makes the layers' mask."""

    attention_mask: Any
    layer_mask: Callable[[Callable[[], Any]], LayerMask]


Mask = TypeVar("Mask", RealRows, Handover, LayerMask)


def find(kind: type[Mask], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mask | None:
    """The argument of this type."""
    for value in args:
        if type(value) is kind:
            return value
    for value in kwargs.values():
        if type(value) is kind:
            return value
    return None


def put(new: Any, old: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with `new` in the place of `old`."""
    return (
        tuple([new if value is old else value for value in args]),
        {name: new if value is old else value for name, value in kwargs.items()},
    )
