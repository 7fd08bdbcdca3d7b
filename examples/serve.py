"""Serves embeddings with Ray Serve, and loads the service: requests/s and latencies, stock against patched, in one run.

    python examples/serve.py --model sentence-transformers/all-MiniLM-L6-v2 --seconds 20 --clients 16

Requests that wait for each other are encoded together: a batch holds at most so many tokens, not so many texts. The
service takes so many requests at a time, so many more wait, and those beyond that are refused (503).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import ray
from ray import serve

BATCH_TOKENS, AT_ONCE, WAITING = 2048, 64, 128
PORT = 8642


def tokens_of(requests: list[list[int]]) -> int:
    return sum(map(len, requests))


@serve.deployment(max_ongoing_requests=AT_ONCE, max_queued_requests=WAITING, ray_actor_options={"num_cpus": 1})
class Embedder:
    def __init__(self, path: str, patched: bool) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        import roberta_kernels as rk
        from roberta_kernels.encoding import longest_input

        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.model = AutoModel.from_pretrained(path).eval()
        self.longest = longest_input(self.model, self.tokenizer)
        if patched:
            print(rk.patch(self.model, padded_rows="zeros"))  # `embed` reads no row at padding

    async def __call__(self, request) -> list[float]:
        body = await request.json()
        ids = self.tokenizer(body["text"], truncation=True, max_length=self.longest)["input_ids"]
        return await self.embed(ids)

    @serve.batch(max_batch_size=BATCH_TOKENS, batch_size_fn=tokens_of, batch_wait_timeout_s=0.002)
    async def embed(self, requests: list[list[int]]) -> list[list[float]]:
        # In a thread: requests go on arriving, so that the next batch is full when this one is done.
        return await asyncio.to_thread(self.compute, requests)

    def compute(self, requests: list[list[int]]) -> list[list[float]]:
        import torch

        batch = self.tokenizer.pad({"input_ids": requests}, return_tensors="pt")
        with torch.inference_mode():
            hidden = self.model(**batch).last_hidden_state
        real = batch["attention_mask"][..., None]
        return ((hidden * real).sum(1) / real.sum(1)).tolist()


def load(texts: list[str], clients: int, seconds: float) -> str:
    """So many clients, each with one request at a time; what they saw."""
    times: list[float] = []
    refused: list[int] = []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        for text in itertools.islice(itertools.cycle(texts), number, None, clients):
            began = time.perf_counter()
            if began > end:
                return
            try:
                body = json.dumps({"text": text}).encode()
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/", body, timeout=60).read()
                times.append(time.perf_counter() - began)
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
                refused.append(number)
                time.sleep(0.05)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    percentiles = [1e3 * value for value in statistics.quantiles(times, n=100)]
    latency = f"p50 {percentiles[49]:.1f} ms, p99 {percentiles[98]:.1f} ms"
    return f"{len(times) / seconds:.1f} requests/s, {latency}, {len(refused)} refused"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", metavar="PATH_OR_ID")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=16)
    arguments = parser.parse_args()
    from roberta_kernels.demo.corpus import docstrings

    texts = docstrings(2000)[::10]
    ray.init(log_to_driver=False, logging_level="warning")
    serve.start(http_options={"host": "127.0.0.1", "port": PORT}, logging_config={"log_level": "ERROR"})
    for name, patched in (("stock", False), ("patched", True)):
        serve.run(Embedder.bind(arguments.model, patched))
        load(texts, arguments.clients, min(2.0, arguments.seconds))  # threads wake up, buffers are made
        print(f"{name}: {load(texts, arguments.clients, arguments.seconds)}")
        serve.delete("default")
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
