"""patch(cuda_graphs=): what is recorded, what a replay gives, and that nothing stale is replayed. A double stands in
for the graphs of a GPU (graph_double.py); whole models run on the CUDA library's emulation:

python tests/cuda_emulation/build.py --plain -- python -m pytest tests/models/test_graphs.py
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from encoder_cases import case_of, hidden, layers_of
from graph_double import OpRecorder
from model_cases import assert_promise, batches_for, build, patched

import roberta_kernels as rk
from roberta_kernels import backends, unpadding
from roberta_kernels.hf import encoder_layers, graphs, route
from roberta_kernels.hf.graphs import LIMIT, Graphs, Rows, bucket_of
from roberta_kernels.hf.state import memory_of

emulated = pytest.mark.skipif(not backends.emulating(), reason="runs on the emulation (see the head of this file)")

# --- the runner by itself ---------------------------------------------------------------------------------------------

TABLE = torch.randn(20, 8)


def compute(rows, sequences):
    """Rows of a table, scaled by what only the lengths tell, on the device; zeros beyond the sequences."""
    count = rows.ids.shape[0]
    ends = sequences.cu_seqlens
    sequence = (torch.arange(count)[:, None] >= ends[1:]).sum(1)
    inside = torch.arange(count) < ends[-1]
    types = 0 if rows.token_types is None else rows.token_types[:, None]
    found = (TABLE[rows.ids] + rows.positions[:, None] + types) * (1 + sequence[:, None])
    if sequences.key_mask is not None:
        found = found * (1 + sequences.key_mask[:, None])
    return found * inside[:, None]


def batch_of(lengths, *, types=False, mask=None):
    """(Rows, Unpadding) of a batch whose rows are all computed."""
    count, longest = sum(lengths), max(lengths)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    ids, positions = torch.randint(20, (count,)), torch.randint(9, (count,))
    seen = None if mask is None else torch.rand(count) < mask
    sequences = unpadding.Sequences(ends, longest, seen, False)
    indices = None if real.all() else real.flatten().nonzero().squeeze(1)
    layout = unpadding.Unpadding(len(lengths), longest, indices, sequences)
    return Rows(ids, positions, torch.randint(2, (count,)) if types else None), layout


def check(runner, batch, counts, key=0):
    """One call; whether it was replayed."""
    rows, layout = batch
    out = runner.run(key, compute, rows, layout, counts)
    if out is not None:
        assert torch.equal(out, layout.pad(compute(rows, layout.sequences)))
    return out is not None


def test_lengths_are_data():
    """One recording is replayed for every batch of its bucket, whatever their lengths."""
    recorder, counts = OpRecorder(), Counter()
    runner = Graphs(recorder)
    batches = [[5, 9, 16, 2], [16, 1, 1], [10, 10, 8], [1, 14, 3, 13], [7, 7, 7, 9]]
    served = [check(runner, batch_of(lengths), counts) for lengths in batches]
    assert len({bucket_of(rows, layout.sequences) for rows, layout in map(batch_of, batches)}) == 1
    assert served == [False, True, True, True, True]
    assert counts == {"recorded": 1, "replayed": 4, "not replayed: the first call of its bucket": 1}
    assert (recorder.recorded, recorder.replayed) == (1, 4)


@pytest.mark.parametrize("types", [False, True])
@pytest.mark.parametrize("mask", [None, 0.5])
def test_what_is_optional_is_part_of_the_bucket(types, mask):
    recorder, counts = OpRecorder(), Counter()
    runner = Graphs(recorder)
    for _ in range(3):
        check(runner, batch_of([3, 16], types=types, mask=mask), counts)
    assert (recorder.recorded, recorder.replayed) == (1, 2)
    assert not check(runner, batch_of([3, 16], types=not types, mask=mask), counts)
    assert not check(runner, batch_of([3, 16], types=types, mask=None if mask else 0.5), counts)
    assert not check(runner, batch_of([3, 16], types=types, mask=mask), counts, key="another route")


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100, 128, 129, 1000, 4096, 5000])
def test_a_bucket_holds_its_batch_and_not_much_more(count):
    rows, layout = batch_of([count])
    bucket = bucket_of(rows, layout.sequences)
    assert count <= bucket.rows <= max(count + 16, count * 1.25)
    assert count <= bucket.longest <= max(16, 2 * count)
    one_each = batch_of([1] * count)
    many = bucket_of(one_each[0], one_each[1].sequences)
    assert count <= many.sequences <= 2 * count


def test_the_least_recently_used_goes():
    recorder, counts = OpRecorder(), Counter()
    runner = Graphs(recorder)
    sizes = (
        [16 * (i + 1) for i in range(8)] + [128 + 32 * (i + 1) for i in range(4)] + [256 + 64 * i for i in range(1, 6)]
    )
    assert len(sizes) == LIMIT + 1
    for size in sizes[:LIMIT]:
        for _ in range(2):
            check(runner, batch_of([size]), counts)
    assert len(runner) == LIMIT
    assert check(runner, batch_of([sizes[0]]), counts), "used, and so not the oldest any more"
    for _ in range(2):
        check(runner, batch_of([sizes[-1]]), counts)
    assert len(runner) == LIMIT
    assert counts["dropped: the least recently used"] == 1
    before = recorder.recorded
    assert check(runner, batch_of([sizes[0]]), counts)
    assert recorder.recorded == before
    assert not check(runner, batch_of([sizes[1]]), counts), "it is as if it had never come"


def test_what_is_given_out_is_no_buffer():
    runner, counts = Graphs(OpRecorder()), Counter()
    first, second = batch_of([16, 16]), batch_of([16, 16])
    outs = [runner.run(0, compute, *batch, counts) for batch in (first, first, second)]
    assert torch.equal(outs[1], first[1].pad(compute(first[0], first[1].sequences)))
    assert not torch.equal(outs[1], outs[2])


def test_what_fails_is_not_tried_again():
    runner, counts = Graphs(OpRecorder(RuntimeError("no capture here\nand much more"))), Counter()
    assert [check(runner, batch_of([16]), counts) for _ in range(4)] == [False] * 4
    assert counts["not recorded: RuntimeError: no capture here"] == 3


def test_a_thread_does_not_wait_for_another():
    """Nor do two write one buffer."""
    recorder, counts = OpRecorder(), Counter()
    runner, batch = Graphs(recorder), batch_of([16])
    entered, go_on = threading.Event(), threading.Event()

    def slow(rows, sequences):
        entered.set()
        assert go_on.wait(60)
        return compute(rows, sequences)

    check(runner, batch, counts)
    thread = threading.Thread(target=lambda: runner.run(0, slow, *batch, Counter()))
    thread.start()
    assert entered.wait(60)
    assert runner.run(0, compute, *batch, counts) is None
    assert counts["not replayed: another thread had the graphs"] == 1
    go_on.set()
    thread.join()
    assert check(runner, batch, counts), "what it recorded serves here"


def test_buffers_made_under_inference_mode_are_written_outside_of_it():
    runner, counts = Graphs(OpRecorder()), Counter()
    with torch.inference_mode():
        for _ in range(2):
            check(runner, batch_of([16]), counts)
    assert check(runner, batch_of([16]), counts)


def test_the_double_is_as_strict_as_a_graph():
    """It reads the memory that it was recorded with, not the tensors of that name."""
    weight = torch.nn.Parameter(torch.ones(3))
    recorder = OpRecorder()
    with torch.no_grad():
        replay, out = recorder.record(lambda: weight * 2)
        weight.mul_(5)
        with recorder.alone([weight]):
            replay()
        assert out.tolist() == [10, 10, 10]
        weight.data = torch.zeros(3)
        with recorder.alone([weight]):
            replay()
        assert out.tolist() == [10, 10, 10]


class _Cuda:
    """torch.cuda, as far as a recorder asks for it: what is called goes to `log`."""

    def __init__(self):
        self.log, self.current = [], "first"

    def current_stream(self, device=None):
        return _Stream(self, self.current)

    def Stream(self, device):
        return _Stream(self, "aside")

    def Event(self):
        return SimpleNamespace(record=lambda stream: self.log.append(f"{stream.name} records"))

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    def graph_pool_handle(self):
        return "pool"

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        assert (pool, stream.name, capture_error_mode) == ("pool", "aside", "thread_local")
        self.log.append("capture")
        yield
        self.log.append("captured")

    def stream(self, stream):
        return contextlib.nullcontext()

    device = stream


class _Stream:
    def __init__(self, cuda, name):
        self.cuda, self.name = cuda, name

    def __eq__(self, other):
        return self.name == other.name

    __hash__ = None

    def wait_stream(self, other):
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.cuda.log.append(f"{self.name} waits")


def test_what_is_asked_of_cuda_and_in_which_order(monkeypatch):
    """A first run beside the stream that is current, then the capture; a user on another stream waits for the last one,
    and from then on buffers outlive what either still has to do."""
    cuda = _Cuda()
    monkeypatch.setattr(graphs.torch, "cuda", cuda)
    recorder = graphs.CudaRecorder(torch.device("cpu"))
    replay, out = recorder.record(lambda: cuda.log.append("run") or "out")
    waits = ["aside waits for first", "run", "first waits for aside"]
    assert (out, cuda.log) == ("out", [*waits, "capture", "run", "captured"])
    buffer = SimpleNamespace(record_stream=lambda stream: cuda.log.append(f"{stream.name} keeps"))
    found = []
    for cuda.current in ("first", "first", "second", "first"):
        cuda.log.clear()
        with recorder.alone([buffer]):
            replay()
        found.append(cuda.log[:])
    alone = ["replay", "first records"]
    assert found[:2] == [alone, alone]
    assert found[2:] == [
        ["second waits", "replay", "second records", "second keeps"],
        ["first waits", *alone, "first keeps"],
    ]


# --- options and the report -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["yes", None, 1.5])
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match="cuda_graphs"):
        patched(build(case_of()), cuda_graphs=value)


def test_on_a_cpu_nothing_is_recorded_and_the_report_says_so():
    model = build(case_of(mask="none"))
    report = rk.patch(model, cuda_graphs=True)
    inputs = batches_for(case_of(mask="none"), model.config, 1)[0]
    hidden(model, inputs)
    assert report.graphs() == {"not recorded: hidden states are not on a GPU": 1}
    assert "not recorded: hidden states are not on a GPU" in " ".join(str(report).split())
    report = rk.patch(model)
    hidden(model, inputs)
    assert report.graphs() == {}


def test_a_replica_has_a_memory_of_its_own():
    """DataParallel gives it the module's __dict__: what was derived from the module holds its parameters."""
    model = patched(build(case_of()))
    own = memory_of(model)
    assert memory_of(model) is own
    assert memory_of(model._replicate_for_data_parallel()) is not own
    assert memory_of(copy.deepcopy(model)) is not own
    assert memory_of(model) is own


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.fixture
def recorder(monkeypatch):
    double = OpRecorder()
    for module in (graphs, route):
        monkeypatch.setattr(module, "make_recorder", lambda device: double)
    return double


def model_and_batches(head="pooler", mask="right", **options):
    case = case_of(head, mask=mask)
    original = build(case)
    return original, patched(original, backend="cuda", cuda_graphs=True, **options), batches_for(case, original.config)


def run_twice(ours, batches):
    for _ in range(2):
        for inputs in batches:
            hidden(ours, inputs)


@emulated
@pytest.mark.parametrize("mask", ["none", "right", "holes"])
@pytest.mark.parametrize("head", ["pooler", "single_label", "masked_lm"])
def test_same_answers(recorder, head, mask):
    original, ours, batches = model_and_batches(head, mask)
    for _ in range(2):
        with torch.no_grad():
            for inputs in batches:
                ours(**inputs)
    before = recorder.replayed
    assert_promise(ours, original, batches, head=head, everywhere=head != "single_label")
    assert recorder.replayed == before + len(batches)


@emulated
def test_edits_are_read_and_what_moved_is_recorded_again(recorder):
    original, ours, batches = model_and_batches()
    run_twice(ours, batches[:1])
    recorded, inputs = recorder.recorded, batches[0]
    for model in (original, ours):
        layers_of(model)[1].intermediate.dense.weight.data.mul_(1.2)
    assert_promise(ours, original, inputs)
    assert recorder.recorded == recorded, "values are read in place"
    for model in (original, ours):
        weight = layers_of(model)[0].attention.output.dense.weight
        weight.data = weight.data * -1.5
    replayed = recorder.replayed
    assert_promise(ours, original, inputs)
    assert recorder.replayed == replayed, "what was recorded reads memory that is no weight any more"
    assert_promise(ours, original, inputs)
    assert recorder.recorded == recorded + 1
    for model in (original, ours):
        model.bfloat16()
    for _ in range(3):
        assert_promise(ours, original, inputs)
    assert recorder.recorded == recorded + 2


@emulated
def test_what_is_not_recorded(recorder):
    original, ours, batches = model_and_batches()
    report = rk.patch(ours, backend="cuda", cuda_graphs=True)
    for _ in range(3):
        ours(**batches[0])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            ours(**batches[0])
    assert recorder.recorded == 0
    assert report.graphs() == {
        "not recorded: gradients are recorded (torch.no_grad() was not set)": 3,
        "not recorded: autocast": 3,
    }
    assert_promise(ours, original, batches[0], backward=True)
    ours = patched(original, backend="cuda")
    run_twice(ours, batches)
    assert recorder.recorded == 0, "auto: nowhere yet"


@emulated
def test_a_failure_runs_without(recorder):
    recorder.fails = RuntimeError("operation not permitted when stream is capturing")
    original, ours, batches = model_and_batches()
    run_twice(ours, batches)
    assert_promise(ours, original, batches)
    counted = ours._rk_state.graphs
    assert counted["not recorded: RuntimeError: operation not permitted when stream is capturing"] >= len(batches)


@emulated
def test_layer_by_layer(recorder, monkeypatch):
    """As Triton's kernels run, which are launched from Python: what is replayed holds none of it."""
    monkeypatch.setattr(encoder_layers, "op_backend", lambda *given: (None, "not here"))
    # Of a GPU's tensors nothing is read; these lie on the host, where rows beyond the sequences are refused.
    monkeypatch.setattr(sys.modules["roberta_kernels.ops.attention"], "check_cu_seqlens", lambda *given: None)
    original, ours, batches = model_and_batches()
    run_twice(ours, batches)
    before = recorder.replayed
    assert_promise(ours, original, batches, everywhere=True)
    assert recorder.replayed == before + len(batches)
