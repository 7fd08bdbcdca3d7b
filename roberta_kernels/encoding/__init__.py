"""encode: a corpus into embeddings, one row for each text, in the order of the input (docs/encoding.md).

Texts are read in windows (sources.py). A window is tokenized, while the one before it is encoded (tokenization.py),
sorted by length and cut into batches of about equal numbers of tokens (batching.py); each batch is padded no further
than its own longest row, and a patched model does not compute even that padding (embedding.py). Windows bound the
memory, and they and their batches follow from the input and the options alone: that is what lets an interrupted run
continue to the same bytes (outputs.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from roberta_kernels.lazy import attributes

if TYPE_CHECKING:
    from roberta_kernels.encoding.corpus import encode
    from roberta_kernels.encoding.embedding import POOLINGS, longest_input, pool
    from roberta_kernels.encoding.outputs import check_output
    from roberta_kernels.encoding.report import EncodeReport
    from roberta_kernels.encoding.sources import EncodingError, check_source, format_of
    from roberta_kernels.encoding.tokenization import WINDOW

__all__ = [
    "POOLINGS",
    "WINDOW",
    "EncodeReport",
    "EncodingError",
    "check_output",
    "check_source",
    "encode",
    "format_of",
    "longest_input",
    "pool",
]

_WHERE = {
    "corpus": ("encode",),
    "embedding": ("POOLINGS", "longest_input", "pool"),
    "outputs": ("check_output",),
    "report": ("EncodeReport",),
    "sources": ("EncodingError", "check_source", "format_of"),
    "tokenization": ("WINDOW",),
}
__getattr__, __dir__ = attributes(__name__, {name: module for module, names in _WHERE.items() for name in names})
