"""What an invented release of transformers is: the installed one with a change of its source; what is asked there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from overlay import Edit, within

ROBERTA = "models/roberta/modeling_roberta.py"
BERT = "models/bert/modeling_bert.py"
MASKS = "masking_utils.py"
OUTPUT = "BaseModelOutputWithPoolingAndCrossAttentions"
# The line of a signature in front of which an argument is added.
LAST_PARAMETER = r"^        \*\*kwargs: Unpack\[TransformersKwargs\],\n    \) ->"


@dataclass(frozen=True)
class Release:
    """`fuses` says what is asked of the package there, beside the same answers, which are asked for always:
        "all"   the mathematics and the ways in are the known ones: a call runs the ops that it runs in the installed
                release;
        "some"  ops of ours run still, and what does not is said;
        "none"  nothing needs to run fused, and what does not is said.

    edits, moved: as overlay.make takes them. names: what a public argument is called there. given: arguments that
    only this release has -> dtype and shape. unfused: calls that need not run fused, by the end of their name.
    interface: whether attn_implementation="roberta_kernels" must be there; without it transformers refuses that name.
    other_answers: whether stock models answer otherwise than in the installed release.
    """

    name: str
    edits: Mapping[str, Edit]
    fuses: str = "all"
    other_answers: bool = False
    moved: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    given: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    unfused: tuple[str, ...] = ()
    interface: bool = True


def both(edit: Callable[[str], Edit]) -> dict[str, Edit]:
    """The same edit of two families, which have the same code under other names."""
    return {ROBERTA: edit("Roberta"), BERT: edit("Bert")}


def forward_of(name: str, edit: Edit) -> Edit:
    return within(f"class {name}(", within("def forward(", edit))
