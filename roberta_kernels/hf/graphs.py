"""The op calls from the embeddings to the last layer, recorded once for a bucket of batches and replayed
(docs/design.md, section 12).

A recording has buffers of a fixed capacity. A batch is copied into them, the recording is replayed, and what comes out
is copied from them: lengths are data, and rows beyond the batch belong to no sequence. What the recording was made from
is watched by whoever keeps it (a survey).
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from roberta_kernels import backends
from roberta_kernels.backends import choosing
from roberta_kernels.unpadding import Sequences, Unpadding

LIMIT = 16  # recordings of a model; the least recently used goes first
_SEEN = 256  # buckets that came once, of which nothing but the key is kept


class Rows(NamedTuple):
    """What the embeddings take of the computed rows: int64 `[T]` each; token_types None: all zero."""

    ids: Tensor
    positions: Tensor
    token_types: Tensor | None


Compute = Callable[[Rows, Sequences], Tensor]  # gives `[T, H]`


class Recorder(Protocol):
    """Records calls on the device, and replays them. Tests have another one than a GPU's."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Runs `run`, so that all that it makes once is there, and records it: what replays it, and its result, which
        each replay writes anew in the same place."""

    def alone(self, buffers: list[Tensor]) -> contextlib.AbstractContextManager[Any]:
        """What is launched inside comes after all that was launched inside before."""


class CudaRecorder:
    """CUDA graphs in one memory pool, as no two of them run at once."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()
        self._last, self._done = torch.cuda.current_stream(device), torch.cuda.Event()
        self._several = False  # whether more than one stream has come

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        current, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            run()  # kernels are compiled, and workspaces made, for these sizes and this stream
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with what a capture forbids.
        with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
            out = run()
        return graph.replay, out

    @contextlib.contextmanager
    def alone(self, buffers: list[Tensor]) -> Any:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            if current != self._last:
                self._several = True
                current.wait_event(self._done)
            yield
            self._done.record(current)
            self._last = current
            if self._several:
                for buffer in buffers:  # which may be another stream's, and must outlive what this one still has to do
                    buffer.record_stream(current)


def make_recorder(device: torch.device) -> Recorder | None:
    """None where nothing can be recorded."""
    return CudaRecorder(device) if device.type == "cuda" else None


def settings() -> tuple[Any, ...]:
    """What a call follows and a recording has in it: which variants run, and how torch multiplies."""
    matmul = torch.backends.cuda.matmul
    return (
        backends.current_backend(),
        *(backends.cuda_variant(op) for op in choosing.VARIANTS),
        torch.get_float32_matmul_precision(),
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )


class Bucket(NamedTuple):
    """Capacities: rows, sequences, and the longest sequence, which attention's grid is made for; and which optional
    tensors there are."""

    rows: int
    sequences: int
    longest: int
    token_types: bool
    key_mask: bool
    causal: bool


def bucket_of(rows: Rows, sequences: Sequences) -> Bucket:
    count, power = rows.ids.shape[0], _power_of_two
    step = max(16, power(count) // 8)
    return Bucket(
        rows=-(-count // step) * step,
        sequences=power(sequences.cu_seqlens.shape[0] - 1),
        longest=max(16, power(sequences.max_seqlen)),
        token_types=rows.token_types is not None,
        key_mask=sequences.key_mask is not None,
        causal=sequences.causal,
    )


def _power_of_two(number: int) -> int:
    """The smallest that is no smaller."""
    return 1 << max(0, number - 1).bit_length()


@dataclass
class _Recording:
    """Buffers of a bucket's capacity, and what replays on them. out: `[capacity, H]`."""

    rows: Rows
    sequences: Sequences
    replay: Callable[[], None]
    out: Tensor

    def buffers(self) -> list[Tensor]:
        rest = (self.sequences.cu_seqlens, self.sequences.key_mask)
        return [tensor for tensor in (*self.rows, *rest) if tensor is not None]


def _empty_batch(bucket: Bucket, device: torch.device) -> tuple[Rows, Sequences]:
    """No sequence: all rows have ids that are there."""

    def zeros(count: int, dtype: torch.dtype, wanted: bool = True) -> Any:
        return torch.zeros(count, dtype=dtype, device=device) if wanted else None

    ids, positions = zeros(bucket.rows, torch.int64), zeros(bucket.rows, torch.int64)
    rows = Rows(ids, positions, zeros(bucket.rows, torch.int64, bucket.token_types))
    cu_seqlens = zeros(bucket.sequences + 1, torch.int32)
    key_mask = zeros(bucket.rows, torch.bool, bucket.key_mask)
    return rows, Sequences(cu_seqlens, min(bucket.longest, bucket.rows), key_mask, bucket.causal)


def _fill(recording: _Recording, rows: Rows, sequences: Sequences) -> None:
    """Rows beyond the batch keep ids of a former one."""
    count, ends = rows.ids.shape[0], sequences.cu_seqlens.shape[0]
    for buffer, tensor in zip(recording.rows, rows, strict=True):
        if buffer is not None and tensor is not None:
            buffer[:count].copy_(tensor)
    cu_seqlens, key_mask = recording.sequences.cu_seqlens, recording.sequences.key_mask
    cu_seqlens[:ends].copy_(sequences.cu_seqlens)
    cu_seqlens[ends:].fill_(count)  # sequences without a row
    if key_mask is not None and sequences.key_mask is not None:
        key_mask[:count].copy_(sequences.key_mask)


class Graphs:
    """The recordings of a model as a survey found it."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._lock = threading.Lock()  # buffers have one user at a time
        self._kept: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._failed: str | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def run(
        self, route: Hashable, compute: Compute, rows: Rows, layout: Unpadding, counts: Counter[str]
    ) -> Tensor | None:
        """compute(rows, layout.sequences), padded again, `[batch, length, H]`; None: the caller is to compute it, and
        counts says why. route: what else compute depends on."""
        if self._failed is not None:
            counts[self._failed] += 1
            return None
        if not self._lock.acquire(blocking=False):
            counts["not replayed: another thread had the graphs"] += 1
            return None
        try:
            key = (route, settings(), bucket_of(rows, layout.sequences))
            recording = self._recording(key, compute, rows.ids.device, counts)
            if recording is None:
                return None
            with self._recorder.alone(recording.buffers()):
                _fill(recording, rows, layout.sequences)
                recording.replay()
                out = recording.out[: rows.ids.shape[0]]
                # What leaves is no view of a buffer: padding copies, where there is some.
                padded = layout.pad(out.clone() if layout.indices is None else out)
            counts["replayed"] += 1
            return padded
        finally:
            self._lock.release()

    def _recording(self, key: Any, compute: Compute, device: torch.device, counts: Counter[str]) -> _Recording | None:
        recording = self._kept.get(key)
        if recording is not None:
            self._kept.move_to_end(key)
            return recording
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > _SEEN:
                self._seen.popitem(last=False)
            counts["not replayed: the first call of its bucket"] += 1
            return None
        while len(self._kept) >= LIMIT:
            self._kept.popitem(last=False)  # its memory goes before that of the new one comes
            counts["dropped: the least recently used"] += 1
        try:
            recording = self._record(key[-1], compute, device)
        except Exception as error:  # whatever it is: the call runs without
            self._failed = f"not recorded: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            counts[self._failed] += 1
            self._kept.clear()
            return None
        self._kept[key] = recording
        del self._seen[key]
        counts["recorded"] += 1
        return recording

    def _record(self, bucket: Bucket, compute: Compute, device: torch.device) -> _Recording:
        # Buffers made under inference_mode could be written nowhere else.
        with torch.inference_mode(False), torch.no_grad():
            rows, sequences = _empty_batch(bucket, device)
            replay, out = self._recorder.record(lambda: compute(rows, sequences))
        return _Recording(rows, sequences, replay, out)
