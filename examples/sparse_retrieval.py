"""Searches docstrings of Python's standard library with SPLADE: a weight for each word of the vocabulary, few not zero.

    python examples/sparse_retrieval.py "How do I compress a file?" --model naver/splade-v3-distilbert

The model is a folder, or the name of one on a hub: any SparseEncoder of the RoBERTa, BERT or DistilBERT families.
"""

from __future__ import annotations

import argparse
import time

import torch
from sentence_transformers import SparseEncoder

import roberta_kernels as rk
from roberta_kernels.demo.corpus import docstrings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--model", default="naver/splade-v3-distilbert", metavar="PATH_OR_ID")
    parser.add_argument("--passages", type=int, default=100)
    arguments = parser.parse_args()
    passages = docstrings(arguments.passages)

    model = SparseEncoder(arguments.model, device="cpu")
    stock, stock_seconds = timed(model, passages)
    rk.patch(model, return_logits=False)  # nobody but the pooling reads logits: they are never all there
    patched, seconds = timed(model, passages)

    query = model.encode_query([arguments.question]).to_dense()
    scores, hits = (query @ patched.t())[0].topk(min(5, len(passages)))
    for score, hit in zip(scores.tolist(), hits.tolist(), strict=True):
        print(f"{score:.3f}  {passages[hit].splitlines()[0]}")
    words = model.decode(query[0], top_k=8)
    print("the question:", ", ".join(f"{word.strip()} {weight:.2f}" for word, weight in words))
    print(f"{len(passages)} passages: {stock_seconds:.2f} s as it comes, {seconds:.2f} s patched")
    print(f"largest difference of a weight: {float((patched - stock).abs().max()):.1e}")


def timed(model: SparseEncoder, passages: list[str]) -> tuple[torch.Tensor, float]:
    model.encode_document(passages[:2])  # threads wake up, buffers are made
    began = time.perf_counter()
    vectors = model.encode_document(passages).to_dense()
    return vectors, time.perf_counter() - began


if __name__ == "__main__":
    main()
