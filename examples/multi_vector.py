"""Searches docstrings of Python's standard library with ColBERT: a vector for each token, compared by MaxSim.

    python examples/multi_vector.py "How do I compress a file?" --model colbert-ir/colbertv2.0

The model is a folder, or the name of one on a hub: any MultiVectorEncoder of the RoBERTa or BERT families. What its
question is lengthened with (query expansion) is the model's own affair, and stays as it is.
"""

from __future__ import annotations

import argparse
import time

import torch
from sentence_transformers import MultiVectorEncoder

import roberta_kernels as rk
from roberta_kernels.demo.corpus import docstrings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--model", default="colbert-ir/colbertv2.0", metavar="PATH_OR_ID")
    parser.add_argument("--passages", type=int, default=100)
    arguments = parser.parse_args()
    passages = docstrings(arguments.passages)

    model = MultiVectorEncoder(arguments.model, device="cpu")
    stock, stock_seconds = timed(model, passages)
    print(rk.patch(model))  # in place; rk.unpatch(model) undoes it
    patched, seconds = timed(model, passages)

    query = model.encode_query([arguments.question])
    scores, hits = model.similarity(query, patched)[0].topk(min(5, len(passages)))
    for score, hit in zip(scores.tolist(), hits.tolist(), strict=True):
        print(f"{score:.3f}  {passages[hit].splitlines()[0]}")
    print(f"vectors: {len(query[0])} of the question, {sum(map(len, patched))} of {len(passages)} passages")
    print(f"{len(passages)} passages: {stock_seconds:.2f} s as it comes, {seconds:.2f} s patched")
    print(f"largest difference of a number: {float((torch.cat(patched) - torch.cat(stock)).abs().max()):.1e}")


def timed(model: MultiVectorEncoder, passages: list[str]) -> tuple[list[torch.Tensor], float]:
    model.encode_document(passages[:2])  # threads wake up, buffers are made
    began = time.perf_counter()
    vectors = model.encode_document(passages)
    return vectors, time.perf_counter() - began


if __name__ == "__main__":
    main()
