"""Ranks docstrings of Python's standard library for a question, with a reranker as it comes and patched.

    python examples/rerank.py "How do I compress a file?" --model cross-encoder/ms-marco-MiniLM-L6-v2

The model is a folder, or the name of one on a hub: any CrossEncoder of the RoBERTa or BERT families.
"""

from __future__ import annotations

import argparse
import time

from sentence_transformers import CrossEncoder

import roberta_kernels as rk
from roberta_kernels.demo.corpus import docstrings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--model", default="cross-encoder/ms-marco-MiniLM-L6-v2", metavar="PATH_OR_ID")
    parser.add_argument("--passages", type=int, default=100)
    arguments = parser.parse_args()
    passages = docstrings(arguments.passages)

    model = CrossEncoder(arguments.model, device="cpu")
    stock, stock_seconds = timed(model, arguments.question, passages)
    print(rk.patch(model))  # in place; rk.unpatch(model) undoes it
    patched, seconds = timed(model, arguments.question, passages)

    for hit in patched[:5]:
        print(f"{hit['score']:.4f}  {passages[hit['corpus_id']].splitlines()[0]}")
    before = {hit["corpus_id"]: hit["score"] for hit in stock}
    largest = max(abs(hit["score"] - before[hit["corpus_id"]]) for hit in patched)
    print(f"{len(passages)} passages: {stock_seconds:.2f} s as it comes, {seconds:.2f} s patched")
    print(f"largest difference of a score: {largest:.1e}")


def timed(model: CrossEncoder, question: str, passages: list[str]) -> tuple[list[dict], float]:
    model.rank(question, passages[:2])  # threads wake up, buffers are made
    began = time.perf_counter()
    ranking = model.rank(question, passages)
    return ranking, time.perf_counter() - began


if __name__ == "__main__":
    main()
