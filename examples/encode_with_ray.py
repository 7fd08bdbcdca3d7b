"""Embeds the rows of a folder of JSONL files with Ray Data, each worker with a patched model of its own.

    python examples/encode_with_ray.py texts/ embeddings/ --model sentence-transformers/all-MiniLM-L6-v2 --workers 2

A dataset of any other source does as well. For files alone, `roberta-kernels encode IN OUT --ray` does the same, can be
continued, and goes on over lines that cannot be read.
"""

from __future__ import annotations

import argparse
import functools

import ray

from roberta_kernels.ray import Encoder


def load(path: str):
    """Called once in each worker: the model and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a file or folder of JSONL with a field `text`")
    parser.add_argument("output", help="a folder of Parquet files")
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID")
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()

    # A worker that dies while it starts is replaced, as one that dies later is.
    ray.data.DataContext.get_current().max_consecutive_actor_init_deaths = 3
    dataset = ray.data.read_json(arguments.source, file_extensions=["jsonl"], lines=True)
    dataset = dataset.map_batches(
        Encoder,
        fn_constructor_kwargs={"load": functools.partial(load, arguments.model), "normalize": True},
        batch_format="pyarrow",
        batch_size=8192,  # sorted by length together, then cut into batches by tokens
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=arguments.workers),
        num_cpus=1,
    )
    dataset.write_parquet(arguments.output)
    written = ray.data.read_parquet(arguments.output)
    print(f"{written.count()} rows with the columns {', '.join(written.columns())}")


if __name__ == "__main__":
    main()
