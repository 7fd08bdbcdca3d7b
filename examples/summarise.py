"""Summarises text files with an encoder-decoder of two RoBERTas (or BERTs), as it comes and patched: the same tokens.

    python examples/summarise.py article.txt other.txt --model patrickvonplaten/roberta2roberta-share-cnn_dailymail

The model is a folder, or the name of one on a hub: an EncoderDecoderModel of families that are known.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, EncoderDecoderModel

import roberta_kernels as rk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID")
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = EncoderDecoderModel.from_pretrained(arguments.model).eval()
    texts = [file.read_text(encoding="utf-8") for file in arguments.files]
    longest = model.config.encoder.max_position_embeddings - 2
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def timed() -> tuple[torch.Tensor, float]:
        began = time.perf_counter()
        tokens = model.generate(**given, num_beams=arguments.beams, max_new_tokens=arguments.new_tokens)
        return tokens, time.perf_counter() - began

    stock, stock_seconds = timed()
    report = rk.patch(model)
    tokens, seconds = timed()
    for file, summary in zip(arguments.files, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
        print(f"{file.name}: {summary.strip()}")
    print(f"{len(texts)} texts: {stock_seconds:.2f} s as it comes, {seconds:.2f} s patched")
    print("the same tokens:", torch.equal(tokens, stock))
    for reason, calls in report.fallbacks().items():
        print(f"as in the original, {calls} times: {reason}")


if __name__ == "__main__":
    main()
