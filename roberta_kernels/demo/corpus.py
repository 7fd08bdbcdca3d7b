"""Real text that every Python carries: the docstrings of its standard library, and a tokenizer trained on them.

Their lengths are what text in production looks like: half are under thirty tokens, one in a hundred is over 450. In
their natural order, three quarters of a batch of sixteen is padding.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# <s>, <pad>, </s>, <unk> have RoBERTa's ids; <mask> follows them, as the last of RoBERTa's depends on its vocabulary.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
LONGEST = 512

_NOT_THE_LIBRARY = {"site-packages", "dist-packages", "lib-dynload", "__pycache__"}
_NOT_TEXT = {"test", "tests", "idlelib", "idle_test", "_bundled"}


def docstrings(limit: int | None = None) -> list[str]:
    """The docstrings of modules, classes and functions, file by file in order of path, each text once.

    limit: stop after so many.
    """
    found: dict[str, None] = {}
    for path in _sources(Path(sysconfig.get_paths()["stdlib"])):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = (ast.get_docstring(node) or "").strip()
                if text:
                    found.setdefault(text)
        if limit is not None and len(found) >= limit:
            break
    return list(found)[:limit]


def _sources(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if not (_NOT_THE_LIBRARY | _NOT_TEXT).intersection(path.relative_to(root).parts):
            yield path


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with RoBERTa's special tokens and layout, `<s> text </s>`, cut off at 512 tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    # The mask swallows the space before it, as RoBERTa's does: what is predicted is the word with its space.
    special = [AddedToken(token, lstrip=token == "<mask>", special=True) for token in SPECIAL_TOKENS]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=LONGEST,
        bos_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        cls_token="<s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token=special[-1],
        model_input_names=["input_ids", "attention_mask"],
    )


def encode(tokenizer: Any, texts: list[str], longest: int = LONGEST) -> list[list[int]]:
    """Token ids with the special ones, cut off at `longest`."""
    return tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
