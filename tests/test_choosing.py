"""The choosing table: what it may say, what it makes `select` answer, and that it costs traced graphs nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from types import SimpleNamespace

import forks
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from roberta_kernels import backends, ops
from roberta_kernels.backends import choosing, op_namespaces, selection
from roberta_kernels.backends.choosing import ChoicesError, Entry
from roberta_kernels.cli import environment
from roberta_kernels.hf.fusable import unserved

ENTRY = Entry(
    op="attention",
    arch_min=90,
    arch_max=90,
    dtype="bfloat16",
    size_min=64,
    size_max=512,
    backend="cuda",
    variant="sm90",
    results="benchmarks/results/a-gpu/results.json",
    commit="0123456789abcdef",
)


def entry(**changes) -> Entry:
    return dataclasses.replace(ENTRY, **changes)


# ------------------------------------------------------------------------------------------------------- the table


def test_the_shipped_table_is_one_and_says_where_it_comes_from():
    for one in choosing.load():
        assert (choosing.PATH.parents[2] / one.results).is_file(), "an entry without its committed results"
    assert choosing.dumps(choosing.load()) == choosing.PATH.read_text()


def test_a_table_survives_its_file(tmp_path):
    path = tmp_path / "choices.json"
    table = choosing.checked([entry(size_min=513, size_max=None, backend="triton", variant=None), ENTRY])
    path.write_text(choosing.dumps(table))
    assert choosing.load(path) == table
    assert [one.size_min for one in table] == [64, 513], "in the order of sizes"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"schema": 2, "entries": []}', '{"schema": 1, "entries": [{}]}', '{"schema": 1, "entries": [1]}'],
)
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "choices.json"
    path.write_text(text)
    with pytest.raises(ChoicesError, match=r"choices\.json"):
        choosing.load(path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"op": "conv2d"}, "no such op"),
        ({"dtype": "float64"}, "no such dtype"),
        ({"backend": "cpu"}, "no such backend"),
        ({"variant": "sm80"}, "no such variant"),  # of attention
        ({"backend": "triton"}, "no such variant"),
        ({"arch_min": 100}, "architectures"),
        ({"size_max": 63}, "sizes"),
        ({"size_min": -1}, "negative"),
        ({"results": ""}, "where it comes from"),
        ({"commit": ""}, "where it comes from"),
    ],
)
def test_a_wrong_entry_is_refused(changes, says):
    with pytest.raises(ChoicesError, match=says):
        choosing.checked([entry(**changes)])


def test_entries_must_not_contradict():
    with pytest.raises(ChoicesError, match="same calls"):
        choosing.checked([ENTRY, entry(size_min=512, size_max=None)])
    with pytest.raises(ChoicesError, match="one variant"):
        choosing.checked([ENTRY, entry(dtype="float16", variant="portable")])
    choosing.checked([ENTRY, entry(arch_min=100, arch_max=100, variant="portable"), entry(dtype="float16")])


def test_ranges_cover_all_sizes_and_leave_what_is_unmeasured():
    table = choosing.checked(
        [ENTRY, entry(size_min=513, size_max=1024), entry(size_min=2000, size_max=None, backend="triton", variant=None)]
    )
    assert choosing.ranges(table, "attention", "bfloat16", 90) == (
        (64, None),
        (1025, "cuda"),
        (2000, None),
        (None, "triton"),
    )
    assert choosing.ranges((ENTRY,), "attention", "bfloat16", 90) == ((64, None), (513, "cuda"), (None, None))
    for op, dtype, arch in (
        ("gelu_ffn", "bfloat16", 90),
        ("attention", "float16", 90),
        ("attention", "bfloat16", 80),
        ("attention", "bfloat16", 100),
    ):
        assert choosing.ranges(table, op, dtype, arch) == ()


def test_variants_are_by_architecture():
    assert choosing.variant((ENTRY,), "attention", 90) == "sm90"
    assert choosing.variant((ENTRY,), "attention", 89) is None
    assert choosing.variant((ENTRY,), "gelu_ffn", 90) is None
    assert choosing.variant((entry(backend="triton", variant=None),), "attention", 90) is None


def test_new_results_replace_what_they_speak_of():
    other_dtype, other_arch = entry(dtype="float16"), entry(arch_min=80, arch_max=80, variant="portable")
    new = entry(size_min=128, size_max=None, commit="fedcba9876543210")
    assert set(choosing.merged([ENTRY, other_dtype, other_arch], [new])) == {new, other_dtype, other_arch}
    # Another variant: what was measured with the old one no longer holds.
    plain = entry(variant="portable")
    assert set(choosing.merged([ENTRY, other_dtype, other_arch], [plain])) == {plain, other_arch}


def test_the_table_for_a_reader_tells_the_unmeasured():
    for op in choosing.OPS:
        [row] = [row for row in choosing.rows(()) if row["op"] == op]
        assert row["from"] == "unmeasured: conservative default"
    rows = [row for row in choosing.rows((ENTRY,), arch=90) if row["op"] == "attention"]
    assert [row["from"] for row in rows] == [
        "benchmarks/results/a-gpu/results.json, commit 0123456789ab",
        choosing.UNMEASURED,
    ]
    assert rows[0]["backend"] == "cuda (sm90)"
    assert rows[0]["here"]
    assert not choosing.rows((ENTRY,), arch=80)[0]["here"]


def test_env_prints_the_table(monkeypatch, capsys):
    monkeypatch.setattr(selection, "_table", (ENTRY,))
    monkeypatch.setattr(environment.out, "width", 200)
    environment.show()
    told = capsys.readouterr().out
    assert "benchmarks/results/a-gpu/results.json, commit 0123456789ab" in told
    assert told.count("unmeasured: conservative default") == len(choosing.OPS)


# -------------------------------------------------------------------------------------------------- what is selected


class FakeLibrary:
    """set_variant and get_variant as csrc/cuda/variants.cpp has them."""

    def __init__(self, **built: tuple[str, ...]) -> None:
        self.built, self.active = built, dict.fromkeys(built, "portable")

    def set_variant(self, op: str, variant: str) -> None:
        if variant not in self.built[op]:
            raise ValueError(f'{op} has no variant "{variant}" in this build')
        self.active[op] = variant

    def get_variant(self, op: str) -> str:
        return self.active[op]


@pytest.fixture
def pretend(monkeypatch) -> Iterator:
    """pretend(table, archs): GPUs of these architectures, with both kinds of kernels, under that table."""
    library = FakeLibrary(attention=("portable", "sm90"), gelu_ffn=("portable",))

    def start(table: tuple[Entry, ...] = (), archs: tuple[int, ...] = (90,), missing: tuple[str, ...] = ()):
        for name in ("cuda", "triton"):
            there = backends.BackendStatus(name not in missing, "pretended")
            monkeypatch.setitem(op_namespaces._status, name, there)
            monkeypatch.setitem(op_namespaces._kernels, name, SimpleNamespace(name=name))
        monkeypatch.setattr(torch.ops, "roberta_kernels_cuda", library, raising=False)
        monkeypatch.setattr(selection, "_table", choosing.checked(table))
        monkeypatch.setattr(selection, "_gpus", dict(enumerate(archs)))
        monkeypatch.setattr(selection, "_broken", {})
        monkeypatch.setattr(selection, "_unprobed", set())
        selection._follow_gpus()
        return library

    yield start
    monkeypatch.undo()
    selection._follow_gpus()


def gpu(dtype: torch.dtype = torch.bfloat16, index: int = 0) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device("cuda", index), dtype=dtype, is_cuda=True, is_cpu=False)


def served(op: str, size: int, dtype: torch.dtype = torch.bfloat16, index: int = 0) -> str:
    return backends.select(gpu(dtype, index), op, size).name


def test_unmeasured_is_tritons(pretend):
    pretend()
    for op in choosing.OPS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert served(op, 100, dtype) == "triton"
    assert served("attention", 100, torch.float64) == "reference"
    assert str(backends.serving(gpu())) == "triton"
    pretend(missing=("triton",))
    assert served("attention", 100) == "cuda"
    pretend(missing=("triton", "cuda"))
    assert served("attention", 100) == "reference"


def test_attention_with_a_bias_goes_to_whom_has_it(pretend):
    """CUDA C++ has none: not by the table, not by order of preference, and asked for it is refused."""
    pretend((entry(size_min=0, size_max=None),))
    assert served("attention", 100) == "cuda"
    assert served(backends.BIASED_ATTENTION, 100) == "triton"
    with backends.backend("cuda"):
        assert served("attention", 100) == "cuda"
        with pytest.raises(backends.BackendError, match="no attention with a bias"):
            served(backends.BIASED_ATTENTION, 100)
    pretend((entry(size_min=0, size_max=None),), missing=("triton",))
    assert served("attention", 100) == "cuda"
    assert served(backends.BIASED_ATTENTION, 100) == "reference"


def test_an_op_without_cuda_kernels_goes_to_whom_has_it(pretend):
    pretend()
    for op in choosing.NOT_IN_CUDA:
        assert served(op, 100) == "triton"
        with backends.backend("cuda"), pytest.raises(backends.BackendError, match=f"it has no {op}"):
            served(op, 100)
        with pytest.raises(choosing.ChoicesError, match="no such op"):
            choosing.checked([entry(op=op, variant=None)])
    with backends.backend("cuda"):
        assert str(backends.serving(gpu())) == "cuda"
    pretend(missing=("triton",))
    for op in choosing.NOT_IN_CUDA:
        assert served(op, 100) == "reference"


def test_the_table_decides_by_op_dtype_and_size(pretend):
    pretend((ENTRY,))
    assert [served("attention", size) for size in (0, 63, 64, 512, 513, 8192)] == [
        *("triton", "triton", "cuda", "cuda", "triton", "triton")
    ]
    assert served("attention", 100, torch.float16) == served("gelu_ffn", 100) == "triton"
    serving = backends.serving(gpu())
    assert str(serving) == "attention: triton or cuda by size; others: triton"
    assert "pretended" in serving.detail


def test_the_table_decides_by_architecture(pretend):
    pretend((ENTRY,), archs=(80,))
    assert served("attention", 100) == "triton"
    pretend((ENTRY,), archs=(90, 80))
    assert served("attention", 100, index=0) == "cuda"
    assert served("attention", 100, index=1) == "triton"
    assert served("attention", 100, index=7) == "triton", "a device that nobody knows"


def test_one_answer_for_all_sizes_is_one_lookup(pretend):
    pretend((entry(size_min=0, size_max=None),), archs=(90, 90))
    assert selection._answers["auto"].chosen["attention", "cuda", torch.bfloat16].name == "cuda"
    pretend((entry(backend="triton", variant=None),))
    assert selection._answers["auto"].chosen["attention", "cuda", torch.bfloat16].name == "triton"
    assert not selection._answers["auto"].by_size, "what is measured agrees with what is not"


def test_an_entry_for_a_backend_that_is_missing_falls_back(pretend):
    pretend((ENTRY,), missing=("cuda",))
    assert served("attention", 100) == "triton"
    pretend((entry(backend="triton", variant=None),), missing=("triton",))
    assert served("attention", 100) == "cuda"


def test_an_override_wins_over_the_table(pretend):
    pretend((ENTRY,))
    with backends.backend("triton"):
        assert served("attention", 100) == "triton"
    assert served("attention", 100) == "cuda"
    with backends.backend("cuda"):
        assert served("attention", 8192) == served("gelu_ffn", 1) == "cuda"
    assert served("attention", 8192) == "triton"


def test_tensors_on_the_cpu_do_not_see_the_table(pretend):
    before = backends.select(torch.empty(0), "attention", 100).name
    pretend((ENTRY,))
    assert backends.select(torch.empty(0), "attention", 100).name == before


def test_unmeasured_variants_stay_portable(pretend):
    assert pretend().active == {"attention": "portable", "gelu_ffn": "portable"}


def test_the_table_sets_the_variant_of_its_architecture(pretend):
    assert pretend((ENTRY,), archs=(80,)).active["attention"] == "portable"
    assert pretend((ENTRY,), archs=(90, 80)).active["attention"] == "portable", "one setting for both"
    assert pretend((ENTRY,), archs=(90, 90)).active["attention"] == "sm90"
    backends.select(gpu(), "attention", 100)


def test_the_table_is_followed_once_cuda_is_initialised(pretend, monkeypatch):
    library = pretend((ENTRY,), archs=())
    assert served("attention", 100) == "triton", "as fake tensors run before that"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, index))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # so that nothing is launched
    selection._on_cuda()
    assert served("attention", 100) == "cuda"
    assert library.active["attention"] == "sm90"


def test_a_variant_that_the_build_lacks_is_left(pretend):
    library = pretend((entry(op="gelu_ffn", variant="sm80"),))
    assert library.active["gelu_ffn"] == "portable"


def test_use_cuda_variant(pretend):
    library = pretend()
    with backends.use_cuda_variant("attention", "sm90"):
        assert library.active["attention"] == backends.cuda_variant("attention") == "sm90"
        with backends.use_cuda_variant("attention", "portable"):
            assert library.active["attention"] == "portable"
        assert library.active["attention"] == "sm90"
    assert library.active["attention"] == "portable"
    with pytest.raises(KeyError), backends.use_cuda_variant("attention", "sm90"):
        raise KeyError
    assert library.active["attention"] == "portable"
    with pytest.raises(backends.BackendError, match="sm80"), backends.use_cuda_variant("gelu_ffn", "sm80"):
        pass
    with pytest.raises(backends.BackendError, match="no variants"), backends.use_cuda_variant("add_layer_norm", "x"):
        pass
    pretend(missing=("cuda",))
    assert backends.cuda_variant("attention") is None
    with pytest.raises(backends.BackendError, match="pretended"), backends.use_cuda_variant("attention", "sm90"):
        pass


# ------------------------------------------------------------------------------------------- what a GPU cannot run


@pytest.fixture
def cards(pretend, monkeypatch) -> Iterator:
    """cards(archs, broken): GPUs that CUDA finds when it is initialised; a launch of these backends fails."""

    def start(*archs: int, broken: tuple[str, ...] = (), table: tuple[Entry, ...] = ()) -> list[str]:
        launches: list[str] = []

        def launch(name: str):
            launches.append(name)
            if name in broken:
                raise RuntimeError(f"{name}: no kernel image is available\nfor execution on the device")

        pretend(table, archs=())
        for name in ("cuda", "triton"):
            kernels = SimpleNamespace(name=name, add_layer_norm_forward=lambda *_, name=name: launch(name))
            monkeypatch.setitem(op_namespaces._kernels, name, kernels)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(archs))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: divmod(archs[index], 10))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        ones = torch.ones
        monkeypatch.setattr(torch, "ones", lambda *args, device=None, **rest: ones(*args, **rest))
        selection._on_cuda()
        return launches

    return start


def test_a_gpu_below_sm_80_gets_the_reference(cards):
    launches = cards(75, 90)
    assert served("attention", 100, index=0) == "reference"
    assert served("attention", 100, index=1) == "triton"
    assert launches == ["cuda", "triton"], "each once, on the GPU that may run them"
    serving = backends.serving(gpu(index=0))
    assert str(serving) == "reference"
    assert "triton cannot run on this GPU: compute capability 7.5 is below 8.0" in serving.detail
    assert "7.5" in (unserved(torch.bfloat16, torch.device("cuda", 0)) or "")
    assert unserved(torch.bfloat16, torch.device("cuda", 1)) is None
    with backends.backend("triton"), pytest.raises(backends.BackendError, match=r"cuda:0: compute capability 7\.5"):
        served("attention", 100, index=0)
    with backends.backend("triton"):
        assert served("attention", 100, index=1) == "triton"
    with backends.backend("reference"):
        assert unserved(torch.bfloat16, torch.device("cuda", 0)) is None, "who asks for it gets it"


def test_a_backend_whose_launch_fails_runs_no_call(cards):
    launches = cards(90, 90, broken=("cuda",), table=(ENTRY,))
    assert served("attention", 100) == "triton", "though the table names the other"
    assert served("attention", 100, index=1) == "triton"
    assert launches == ["cuda", "triton"], "once for both GPUs, which are alike"
    assert backends.serving(gpu()).broken == {"cuda": "cuda: no kernel image is available"}
    assert unserved(torch.bfloat16, torch.device("cuda", 0)) is None
    cards(90, broken=("cuda", "triton"))
    assert served("gelu_ffn", 7) == "reference"
    assert unserved(torch.bfloat16, torch.device("cuda", 0)) == "cuda: no kernel image is available"


def test_nothing_is_launched_into_a_capture(cards, monkeypatch):
    launches = cards(90, broken=("triton",))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert served("attention", 100) == "triton"
    assert launches == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert served("attention", 100) == "cuda"


# ------------------------------------------------------------------------------------------- what it costs a trace


def attention(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(tokens, 2, 16), torch.tensor([0, tokens], dtype=torch.int32)


def compilations(sizes: tuple[int, ...]) -> list[int]:
    """How often attention was compiled after each of these sizes, in one run."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(
        lambda q, ends: ops.attention(q, q, q, ends, max_seqlen_q=q.shape[0]),
        backend=counter,
        fullgraph=True,
        dynamic=True,
    )
    counts = []
    with torch.no_grad():
        for size in sizes:
            q, ends = torch.randn(size, 2, 16), torch.tensor([0, size], dtype=torch.int32)
            assert torch.equal(compiled(q, ends), ops.attention(q, q, q, ends, max_seqlen_q=size))
            counts.append(counter.frame_count)
    torch._dynamo.reset()
    return counts


def test_without_entries_a_trace_does_not_look_at_sizes():
    with backends.backend("reference"):
        assert compilations((9, 14, 100)) == [1, 1, 1]


def test_with_entries_a_trace_is_tied_to_a_range_and_no_more(monkeypatch):
    with backends.backend("reference"):
        serves = backends.namespaces()["reference"]
        answers = selection._answers["reference"]
        steps = ((64, serves), (float("inf"), serves))
        monkeypatch.delitem(answers.chosen, ("attention", "cpu", torch.float32))
        monkeypatch.setitem(answers.by_size, ("attention", torch.device("cpu"), torch.float32), steps)
        assert compilations((9, 14, 100, 200, 10)) == [1, 1, 2, 2, 2]


def test_importing_the_package_initialises_no_gpu():
    code = "import torch, roberta_kernels; assert not torch.cuda.is_initialized()"
    done = forks.python("-c", code)
    assert done.returncode == 0, done.stderr


def test_entries_are_plain_json():
    assert json.loads(choosing.dumps([ENTRY]))["entries"] == [dataclasses.asdict(ENTRY)]
