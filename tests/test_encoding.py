"""encode: the same embeddings as one text at a time, whatever is wrong with a line, and however often it is stopped."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

import roberta_kernels as rk
from roberta_kernels import cli, encoding, prepacked, tolerance
from roberta_kernels.demo import corpus
from roberta_kernels.encoding import outputs, sources

TEXTS = [
    *cli.SENTENCES,
    "",
    " ",
    *(" ".join(random.Random(i).choices(("the", "ferry", "leaves", "at", "seven", "là"), k=i)) for i in range(1, 40)),
]
SMALL = {"window": 16, "batch_tokens": 100}  # several windows, and several batches in each


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A model with a head, and its tokenizer, as files."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,
    )
    path = tmp_path_factory.mktemp("model")
    model = transformers.RobertaForMaskedLM(config)
    for parameter in model.parameters():  # RobertaModel's own start is so small that every text embeds alike
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def model(folder):
    return transformers.RobertaForMaskedLM.from_pretrained(folder)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines[20] = '{"text": null}'
    lines[3] = "not JSON"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def one_by_one(model, tokenizer, texts):
    """Token vectors by the book: no padding, no batches."""
    rows = []
    for text in texts:
        batch = tokenizer([text], truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            rows.append(model.base_model(**batch).last_hidden_state[0])
    return rows


def pooled(rows, pooling, normalize=False):
    pool = {"mean": lambda row: row.mean(0), "cls": lambda row: row[0], "max": lambda row: row.max(0).values}[pooling]
    return torch.stack([pool(row) / pool(row).norm() if normalize else pool(row) for row in rows])


# -- the embeddings ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vectors(folder, tokenizer):
    """Of the original model, in float32 and in float64."""
    model = transformers.RobertaForMaskedLM.from_pretrained(folder).eval()
    return one_by_one(model, tokenizer, TEXTS), one_by_one(model.double(), tokenizer, TEXTS)


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", False), ("mean", True), ("cls", False), ("max", True)])
@pytest.mark.parametrize("patch", [True, False])
def test_the_embeddings_are_those_of_one_text_at_a_time(model, tokenizer, vectors, pooling, normalize, patch):
    original, exact = (pooled(rows, pooling, normalize) for rows in vectors)
    order = list(range(len(TEXTS)))
    for seed in range(2):  # batches of another composition
        random.Random(seed).shuffle(order)
        report = rk.encode(
            model, tokenizer, [TEXTS[i] for i in order], pooling=pooling, normalize=normalize, patch=patch, **SMALL
        )
        assert report.packed == patch
        ours = torch.empty_like(original)
        ours[order] = torch.from_numpy(report.embeddings)
        tolerance.assert_three_way(ours, original, exact, floor_ulps=4)
        for i, text in enumerate(TEXTS):  # no row hides behind the others
            assert (ours[i] - exact[i]).norm() < 1e-4 * exact[i].norm(), text


def test_what_it_reports(model, tokenizer, capsys):
    lengths = np.array([len(ids) for ids in tokenizer(TEXTS, truncation=True, max_length=64)["input_ids"]])
    longer = sum(len(ids) > 64 for ids in tokenizer(TEXTS)["input_ids"])
    fits = next(ids for ids in tokenizer(TEXTS)["input_ids"] if len(ids) > 64)[1:63]
    exactly = tokenizer.decode(fits)
    assert len(tokenizer(exactly)["input_ids"]) == 64
    plain = [lengths[i : i + 32] for i in range(0, len(lengths), 32)]
    padding = sum(len(rows) * rows.max() - rows.sum() for rows in plain)
    report = rk.encode(model, tokenizer, TEXTS, progress=True)
    assert f"{len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err
    assert (report.texts, report.tokens, report.bad) == (len(TEXTS), lengths.sum(), 0)
    assert report.truncated == longer > 0
    assert (report.padding, report.padding_avoided) == (0, padding)
    assert report.tokens_per_second == pytest.approx(report.tokens / report.seconds)
    assert report.detours == []
    assert rk.encode(model, tokenizer, [exactly]).truncated == 0
    assert rk.encode(model, tokenizer, [exactly], max_length=63).truncated == 1
    for word in ("tokens/s", "truncated", "avoided"):
        assert word in str(report)
    json.dumps(report.as_dict())

    padded = rk.encode(model, tokenizer, TEXTS, patch=False, **SMALL)
    assert not padded.packed
    assert padded.padding > 0
    assert padded.detours == ["patch=False"]


def test_the_model_is_left_as_it_was(model, tokenizer):
    model.train()
    model.roberta.embeddings.eval()
    modes = [module.training for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    first = rk.encode(model, tokenizer, TEXTS).embeddings  # dropout would show
    assert [module.training for module in model.modules()] == modes
    assert [type(module) for module in model.modules()] == classes

    with pytest.raises(RuntimeError, match="broken"):
        rk.encode(model, lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("broken")), TEXTS)
    assert not rk.is_patched(model)
    assert [module.training for module in model.modules()] == modes

    rk.patch(model, packed=False)
    report = rk.encode(model, tokenizer, TEXTS)
    assert rk.is_patched(model)
    assert not report.packed
    np.testing.assert_allclose(report.embeddings, first, rtol=1e-4, atol=1e-5)


def test_a_detour_is_found_and_batches_count_their_padding(model, tokenizer):
    model.roberta.encoder.register_forward_hook(lambda *args: None)
    report = rk.encode(model, tokenizer, TEXTS)
    assert not report.packed
    assert report.detours == ["hooks on the encoder"]
    assert report.padding > 0


def test_a_model_of_another_family_runs_as_it_is(tokenizer):
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(vocab_size=400, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
    model = transformers.DistilBertModel(config).eval()
    report = rk.encode(model, tokenizer, TEXTS[:8])
    assert not report.packed
    assert report.detours
    expected = model(**tokenizer([TEXTS[4]], return_tensors="pt")).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(report.embeddings[4], expected.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models(model, tokenizer, vectors, dtype):
    model = model.to(dtype).eval()
    original, exact = pooled(one_by_one(model, tokenizer, TEXTS), "mean"), pooled(vectors[1], "mean")
    ours = torch.from_numpy(rk.encode(model, tokenizer, TEXTS).embeddings)
    tolerance.assert_three_way(ours.to(dtype), original, exact)


def test_longest_input_of_both_kinds_of_position_tables(model):
    assert encoding.longest_input(model) == 64
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=40
    )
    assert encoding.longest_input(transformers.BertModel(config)) == 40


def test_plans_hold_every_row_once_and_their_budget():
    generator = np.random.default_rng(0)
    for budget in (1, 64, 300):
        for packed in (True, False):
            lengths = generator.integers(0, 65, 200)
            batches = encoding.plan(lengths, budget, packed)
            assert sorted(np.concatenate(batches)) == np.flatnonzero(lengths).tolist()
            for rows in batches:
                padded = len(rows) * lengths[rows].max()
                fits = lengths[rows].sum() <= budget and padded <= 2 * budget if packed else padded <= budget
                assert fits or len(rows) == 1
    assert len(encoding.plan(np.full(10, 10), 50, True)) == 2  # no smaller than they must be
    assert encoding.plan(np.zeros(3, int), 50, True) == []


# -- files -------------------------------------------------------------------------------------------------------------


def write(path: Path, texts: list[str | None]) -> Path:
    if path.suffix == ".txt":
        path.write_bytes("".join(f"{text}\n" for text in texts).encode())
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"id": range(len(texts)), "body": texts}), path, row_group_size=7)
    return path


def read(path: Path, dtype=np.float32) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    column = pytest.importorskip("pyarrow.parquet").read_table(path)["embedding"].combine_chunks()
    width = column.type.list_size
    return np.array([np.full(width, np.nan) if row is None else row for row in column.to_pylist()], dtype)


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("out", ["out.npy", "out.parquet"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_format(model, tokenizer, tmp_path, kind, out, dtype):
    if "parquet" in kind + out:
        pytest.importorskip("pyarrow")
    expected = rk.encode(model, tokenizer, TEXTS, **SMALL).embeddings.astype(dtype)
    source = write(tmp_path / f"in{kind}", TEXTS)
    report = rk.encode(model, tokenizer, source, tmp_path / out, field="body", dtype=dtype, **SMALL)
    np.testing.assert_array_equal(read(tmp_path / out, dtype), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, out])
    if out == "out.npy":
        assert isinstance(report.embeddings, np.memmap)
        assert report.embeddings.dtype == dtype


@pytest.mark.parametrize("out", ["out.npy", "out.parquet"])
def test_a_corpus_of_nothing(model, tokenizer, tmp_path, out):
    if out == "out.parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / "in.txt").write_bytes(b"")
    report = rk.encode(model, tokenizer, tmp_path / "in.txt", tmp_path / out)
    assert (report.texts, report.tokens) == (0, 0)
    assert len(read(tmp_path / out)) == 0
    assert rk.encode(model, tokenizer, []).embeddings.shape == (0, 32)


def test_lines(tmp_path, monkeypatch):
    def rows(content: bytes, name: str = "in.txt"):
        (tmp_path / name).write_bytes(content)
        source = sources.open_source(tmp_path / name, None, "text")
        found = list(source.read(0))
        assert source.rows == len(found)
        assert list(source.read(2)) == found[2:]
        return [row.reason if isinstance(row, sources.Bad) else row for row in found]

    assert rows(b"\xef\xbb\xbfone\r\ntwo\n\n \nlast\x0bone\xe2\x80\xa8line") == [
        *("one", "two", "", " ", "last\x0bone\u2028line"),
    ]
    bad = rows(b"good\n\xff\xfe\ngood\n")
    assert bad[::2] == ["good", "good"]
    assert "not UTF-8" in bad[1]

    monkeypatch.setattr(sources, "LONGEST_LINE", 10)
    assert rows(b"0123456789\n012345678\n" + b"x" * 3_000_000 + b"\nnext") == [
        *("longer than 10 bytes", "012345678", "longer than 10 bytes", "next"),
    ]


BAD_JSON = {
    b"": "not JSON",
    b"{": "not JSON",
    b'{"text": NaN x}': "not JSON",
    b"[" * 200_000: "not JSON",
    b'["text"]': "not a JSON object",
    b"7": "not a JSON object",
    b'{"other": "x"}': "no field 'text'",
    b'{"text": null}': "null",
    b'{"text": 5}': "not a string: int",
    b'{"text": ["x"]}': "not a string: list",
    b'{"text": "\\ud800"}': "not text",
    b'{"text": "\xff"}': "not UTF-8",
}


@pytest.mark.parametrize("out", ["out.npy", "out.parquet"])
def test_a_bad_line_does_not_stop_the_rest(model, tokenizer, tmp_path, out):
    if out == "out.parquet":
        pytest.importorskip("pyarrow")
    good = b'{"text": "the ferry"}'
    lines = [line for bad in BAD_JSON for line in (bad, good)]
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(lines))
    report = rk.encode(model, tokenizer, path, tmp_path / out, window=5)
    found = read(tmp_path / out)
    assert report.bad == len(BAD_JSON)
    assert np.isnan(found[::2]).all()
    assert not np.isnan(found[1::2]).any()
    assert report.errors == tmp_path / f"{out}.errors.jsonl"
    entries = [json.loads(line) for line in report.errors.read_text().splitlines()]
    assert [entry["row"] for entry in entries] == list(range(0, len(lines), 2))
    assert [entry["line"] for entry in entries] == list(range(1, len(lines) + 1, 2))
    for entry, reason in zip(entries, BAD_JSON.values(), strict=True):
        assert entry["reason"].startswith(reason)
    assert "line 1: not JSON" in str(report)


def test_bad_rows_of_a_parquet_file(model, tokenizer, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    damaged = pyarrow.array([b"the ferry", b"\xff", None, b"leaves"]).cast(pyarrow.binary()).view(pyarrow.string())
    kinds = {
        "text": damaged,
        "large": damaged.cast(pyarrow.large_string()),
        "dictionary": damaged.dictionary_encode(),
        "number": [1, 2, 3, 4],
    }
    parquet.write_table(pyarrow.table(kinds), tmp_path / "in.parquet")
    for field in ("text", "large", "dictionary"):
        report = rk.encode(model, tokenizer, tmp_path / "in.parquet", field=field)
        assert [row for row, _ in report.bad_rows] == [1, 2]
        assert np.isnan(report.embeddings).all(1).tolist() == [False, True, True, False]
    with pytest.raises(rk.EncodingError, match="not text, but int64"):
        rk.encode(model, tokenizer, tmp_path / "in.parquet", field="number")
    with pytest.raises(rk.EncodingError, match="no column 'body'; it has: text, large"):
        rk.encode(model, tokenizer, tmp_path / "in.parquet", field="body")
    (tmp_path / "in.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(rk.EncodingError, match="not a Parquet file"):
        rk.encode(model, tokenizer, tmp_path / "in.parquet")


def test_texts_of_no_tokens_are_bad(model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = None
    report = rk.encode(model, bare, ["", "the ferry"])
    assert report.bad_rows == [(0, "no tokens")]


def test_python_objects(model, tokenizer, tmp_path):
    texts = ["the ferry", None, 7, b"bytes", "leaves \ud800"]
    report = rk.encode(model, tokenizer, texts)
    assert [row for row, _ in report.bad_rows] == [1, 2, 3, 4]
    from_iterator = rk.encode(model, tokenizer, iter(texts), tmp_path / "out.npy")
    np.testing.assert_array_equal(from_iterator.embeddings, report.embeddings)
    with pytest.raises(TypeError, match="one string"):
        rk.encode(model, tokenizer, "the ferry")


# -- memory ------------------------------------------------------------------------------------------------------------


def test_no_more_than_two_windows_are_read_ahead(model, tokenizer, monkeypatch):
    read = 0

    def texts():
        nonlocal read
        for i in range(400):
            read = i + 1
            yield TEXTS[i % len(TEXTS)]

    ahead = []
    embed, done = encoding._embed, 0

    def embed_and_look(base, rows, *rest):
        nonlocal done
        ahead.append(read - done)
        done += len(rows)
        return embed(base, rows, *rest)

    monkeypatch.setattr(encoding, "_embed", embed_and_look)
    rk.encode(model, tokenizer, texts(), **SMALL)
    assert done == 400
    assert max(ahead) <= 2 * SMALL["window"]

    ahead, done = [], 0
    monkeypatch.setattr(encoding, "WINDOW_CHARACTERS", 100)  # two or three texts
    rk.encode(model, tokenizer, texts())
    assert done == 400
    assert max(ahead) < 100


def test_a_file_is_not_held_in_memory(tmp_path):
    path = tmp_path / "in.txt"
    with open(path, "wb") as file:
        for _ in range(200):
            file.write(b"x" * 100_000 + b"\n")
        file.write(b"x" * 20_000_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in sources.open_source(path, None, "text").read(0)) == 201
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12_000_000 < path.stat().st_size / 3


# -- interrupted -------------------------------------------------------------------------------------------------------


class Stop:
    """_embed that is interrupted after some calls, and counts."""

    def __init__(self, monkeypatch, after: int | None = None, error: type[BaseException] = KeyboardInterrupt):
        self.calls, self._after, self._error = 0, after, error
        self._embed = right_embed
        monkeypatch.setattr(encoding, "_embed", self)

    def __call__(self, *args):
        if self.calls == self._after:
            raise self._error
        self.calls += 1
        return self._embed(*args)


right_embed = encoding._embed


@pytest.mark.parametrize("out", ["out.npy", "out.parquet"])
def test_interrupted_and_continued_is_the_same_file(model, tokenizer, file, tmp_path, monkeypatch, out):
    if out == "out.parquet":
        pytest.importorskip("pyarrow")
    whole, path = tmp_path / f"whole-{out}", tmp_path / out
    counted = Stop(monkeypatch)
    expected = rk.encode(model, tokenizer, file, whole, **SMALL)
    batches = counted.calls
    assert batches > 8
    done = 0
    for after, error in ((0, KeyboardInterrupt), (3, KeyboardInterrupt), (4, RuntimeError)):
        stop = Stop(monkeypatch, after, error)
        with pytest.raises(error):
            rk.encode(model, tokenizer, file, path, **SMALL)
        done += stop.calls
        assert not path.exists()
        assert not rk.is_patched(model)
    rest = Stop(monkeypatch)
    report = rk.encode(model, tokenizer, file, path, **SMALL)
    assert done + rest.calls == batches  # nothing twice
    assert report.resumed > 0
    assert path.read_bytes() == whole.read_bytes()
    errors = outputs.beside(path, ".errors.jsonl")
    assert errors.read_bytes() == outputs.beside(whole, ".errors.jsonl").read_bytes()
    for name in ("texts", "tokens", "padding_avoided", "bad", "truncated", "bad_rows"):
        assert getattr(report, name) == getattr(expected, name)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {file.name, *(p.name for p in (path, whole, errors, outputs.beside(whole, ".errors.jsonl")))}


def test_an_interrupt_at_any_point_of_saving_keeps_the_file_whole(model, tokenizer, file, tmp_path, monkeypatch):
    """Interrupts come between any two steps: here before and after each that changes a file or the state."""
    whole = tmp_path / "whole.npy"
    rk.encode(model, tokenizer, file, whole, **SMALL)
    monkeypatch.setattr(outputs, "SAVE_EVERY", 0.0)
    steps = [
        (name, before) for name in ("start_window", "write", "end_batch", "end_window", "_save") for before in (0, 1)
    ]
    for number, (name, before) in enumerate(steps):
        path, calls = tmp_path / f"out{number}.npy", 0
        right = getattr(outputs.FileOutput, name)

        def step(self, *args, right=right, before=before):
            nonlocal calls
            calls += 1
            if calls == 3 and before:
                raise KeyboardInterrupt
            result = right(self, *args)
            if calls == 3:
                raise KeyboardInterrupt
            return result

        with monkeypatch.context() as patched:
            patched.setattr(outputs.FileOutput, name, step)
            with pytest.raises(KeyboardInterrupt):
                rk.encode(model, tokenizer, file, path, **SMALL)
        rk.encode(model, tokenizer, file, path, **SMALL)
        assert path.read_bytes() == whole.read_bytes(), name


def test_interrupted_while_the_parquet_file_is_written(model, tokenizer, file, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    path = tmp_path / "out.parquet"
    with monkeypatch.context() as patched:
        write_parquet = outputs.FileOutput._write_parquet

        def interrupted(self, new):
            write_parquet(self, new)
            raise KeyboardInterrupt

        patched.setattr(outputs.FileOutput, "_write_parquet", interrupted)
        with pytest.raises(KeyboardInterrupt):
            rk.encode(model, tokenizer, file, path, **SMALL)
    assert not path.exists()
    rest = Stop(monkeypatch)
    report = rk.encode(model, tokenizer, file, path, **SMALL)
    assert rest.calls == 0
    assert report.resumed == report.texts == len(read(path)) == len(TEXTS)


# Once there is something to continue from it waits to be killed: however fast or busy the machine, it does not end.
KILLED = """
import json, sys, time, torch, transformers
torch.set_num_threads(1)
import roberta_kernels as rk
from pathlib import Path
from roberta_kernels import encoding
from roberta_kernels.encoding import outputs
outputs.SAVE_EVERY = 0.0
embed = encoding._embed
folder, source, out = sys.argv[1:]
state = outputs.beside(Path(out), ".state.json")
def waiting(*args):
    while state.exists() and json.loads(state.read_text())["state"]["rows"] > 0:
        time.sleep(1)
    return embed(*args)
encoding._embed = waiting
model = transformers.RobertaForMaskedLM.from_pretrained(folder)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
rk.encode(model, tokenizer, Path(source), out, window=16, batch_tokens=100)
"""


def test_killed_and_continued_is_the_same_file(model, tokenizer, folder, file, tmp_path):
    whole, path = tmp_path / "whole.npy", tmp_path / "out.npy"
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rk.encode(model, tokenizer, file, whole, **SMALL)
        package = str(Path(rk.__file__).resolve().parent.parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
        process = subprocess.Popen([sys.executable, script, folder, file, path], env=environment)
        state, rows = outputs.beside(path, ".state.json"), 0
        deadline = time.monotonic() + 600
        while rows == 0 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
            if state.exists():
                rows = json.loads(state.read_text())["state"]["rows"]
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # and had not ended by itself
        assert not path.exists()
        report = rk.encode(
            model, transformers.AutoTokenizer.from_pretrained(folder), file, path, **SMALL
        )  # as another process would
    finally:
        torch.set_num_threads(threads)
    assert report.resumed >= rows > 0
    assert path.read_bytes() == whole.read_bytes()


@pytest.fixture
def interrupted(model, tokenizer, file, tmp_path, monkeypatch):
    """An output that stopped half way."""
    with monkeypatch.context() as patched:
        Stop(patched, 5)
        with pytest.raises(KeyboardInterrupt):
            rk.encode(model, tokenizer, file, tmp_path / "out.npy", **SMALL)
    return tmp_path / "out.npy"


def change_input(model, tokenizer, file):
    file.write_text(file.read_text().replace("seven", "eight"), encoding="utf-8")


def change_model(model, tokenizer, file):
    with torch.no_grad():
        model.roberta.encoder.layer[1].output.dense.weight[3, 5] += 1e-6


def change_config(model, tokenizer, file):
    model.config.layer_norm_eps = 1e-3


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        (change_input, {}, "input"),
        (change_model, {}, "model"),
        (change_config, {}, "model"),
        (None, {"format": "text"}, "format"),
        (None, {"field": "body"}, "field"),
        (None, {"pooling": "cls"}, "pooling"),
        (None, {"normalize": True}, "normalize"),
        (None, {"dtype": "float16"}, "dtype"),
        (None, {"max_length": 9}, "max_length"),
        (None, {"batch_tokens": 101}, "batch_tokens"),
        (None, {"window": 17}, "window"),
        (None, {"patch": False}, "kernels"),
        (None, {"backend": "reference"}, "kernels"),
    ],
)
def test_what_changed_is_refused_and_named(model, tokenizer, file, interrupted, change, options, named):
    if change is not None:
        change(model, tokenizer, file)
    before = {path: path.read_bytes() for path in interrupted.parent.iterdir()}
    with pytest.raises(rk.EncodingError, match=rf"differs in: .*\b{named} \(was .*overwrite"):
        rk.encode(model, tokenizer, file, interrupted, **(SMALL | options))
    assert {path: path.read_bytes() for path in interrupted.parent.iterdir()} == before
    report = rk.encode(model, tokenizer, file, interrupted, overwrite=True, **(SMALL | options))
    assert report.resumed == 0
    assert report.texts == len(TEXTS)


def test_another_tokenizer_is_refused(model, file, interrupted):
    other = corpus.train_tokenizer(["nothing of it"], 300)
    with pytest.raises(rk.EncodingError, match="differs in: tokenizer"):
        rk.encode(model, other, file, interrupted, **SMALL)


def test_damaged_states_are_refused(model, tokenizer, file, interrupted):
    state, partial = outputs.beside(interrupted, ".state.json"), outputs.beside(interrupted, ".partial")
    good = state.read_text()
    for damage in ("", "{", "[]", "{}", good.replace('"rows"', '"rose"'), good.replace('"batches": ', '"batches": "')):
        state.write_text(damage)
        with pytest.raises(rk.EncodingError, match="damaged"):
            rk.encode(model, tokenizer, file, interrupted, **SMALL)
    state.write_text(good)
    with pytest.raises(rk.EncodingError, match="iterator cannot continue"):
        rk.encode(model, tokenizer, iter(TEXTS), interrupted, **SMALL)
    partial.unlink()
    with pytest.raises(rk.EncodingError, match="partial is not what"):
        rk.encode(model, tokenizer, file, interrupted, **SMALL)
    assert not partial.exists()


def test_an_iterator_leaves_nothing_behind(model, tokenizer, tmp_path, monkeypatch):
    Stop(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        rk.encode(model, tokenizer, iter([*TEXTS, None]), tmp_path / "out.npy", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_an_output_is_not_overwritten_unasked(model, tokenizer, file, tmp_path):
    path = tmp_path / "out.npy"
    path.write_bytes(b"precious")
    with pytest.raises(rk.EncodingError, match="exists"):
        rk.encode(model, tokenizer, file, path)
    assert path.read_bytes() == b"precious"
    assert not outputs.beside(path, ".partial").exists()
    rk.encode(model, tokenizer, file, path, overwrite=True)
    assert np.load(path).shape == (len(TEXTS), 32)


def test_two_runs_into_one_file_are_refused(model, tokenizer, file, tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    refused = []

    def embed(*args):
        if not refused:
            refused.append(True)
            for options in ({}, {"overwrite": True}):
                with pytest.raises(rk.EncodingError, match="another run"):
                    rk.encode(model, tokenizer, file, tmp_path / "out.npy", **options, **SMALL)
        return right_embed(*args)

    monkeypatch.setattr(encoding, "_embed", embed)
    rk.patch(model)
    rk.encode(model, tokenizer, file, tmp_path / "out.npy", **SMALL)
    expected = rk.encode(model, tokenizer, file, **SMALL).embeddings
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


def test_a_file_that_changes_under_the_run_is_noticed(model, tokenizer, file, tmp_path, monkeypatch):
    def embed(*args):
        os.truncate(file, file.stat().st_size - 100)
        return right_embed(*args)

    monkeypatch.setattr(encoding, "_embed", embed)
    with pytest.raises(rk.EncodingError, match="changed while it was read"):
        rk.encode(model, tokenizer, file, tmp_path / "out.npy", **SMALL)
    assert list(tmp_path.iterdir()) == [file]  # what of it was encoded cannot be told


def test_a_list_that_changes_under_the_run_is_noticed(model, tokenizer, tmp_path, monkeypatch):
    texts = TEXTS.copy()

    def embed(*args):
        texts.pop()
        return right_embed(*args)

    monkeypatch.setattr(encoding, "_embed", embed)
    with pytest.raises(rk.EncodingError, match="changed while they were read"):
        rk.encode(model, tokenizer, texts, tmp_path / "out.npy", **SMALL)
    assert list(tmp_path.iterdir()) == []


# -- bad requests ------------------------------------------------------------------------------------------------------


def test_bad_requests(model, tokenizer, tmp_path, monkeypatch):
    for options in ({"pooling": "sum"}, {"dtype": "bfloat16"}, {"window": 0}, {"batch_tokens": 0}, {"max_length": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            rk.encode(model, tokenizer, TEXTS, **options)
    with pytest.raises(ValueError, match="max_length is 65, and the model takes 64"):
        rk.encode(model, tokenizer, TEXTS, max_length=65)
    with pytest.raises(TypeError, match="the one inside it"):
        rk.encode(torch.nn.Sequential(model), tokenizer, TEXTS)
    t5 = transformers.T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(rk.EncodingError, match="pass its encoder"):
        rk.encode(transformers.T5Model(t5), tokenizer, TEXTS)
    with pytest.raises(rk.EncodingError, match=r"\.npy or \.parquet"):
        rk.encode(model, tokenizer, TEXTS, tmp_path / "out.csv")
    with pytest.raises(rk.EncodingError, match="does not say its format"):
        rk.encode(model, tokenizer, tmp_path / "in.csv")
    with pytest.raises(FileNotFoundError):
        rk.encode(model, tokenizer, tmp_path / "in.txt")
    with pytest.raises(rk.EncodingError, match="not this model's"):
        rk.encode(model, corpus.train_tokenizer(TEXTS, 900), TEXTS)
    with pytest.raises(rk.BackendError):
        rk.encode(model, tokenizer, TEXTS, backend="abacus")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for texts, out in ((tmp_path / "in.parquet", "out.npy"), (TEXTS, "out.parquet")):
        with pytest.raises(rk.EncodingError, match=r"pip install roberta_kernels\[parquet\]"):
            rk.encode(model, tokenizer, texts, tmp_path / out)
    assert list(tmp_path.iterdir()) == []


def test_the_input_is_not_overwritten(model, tokenizer, tmp_path):
    pytest.importorskip("pyarrow")
    path = write(tmp_path / "in.parquet", TEXTS)
    with pytest.raises(rk.EncodingError, match="both the input and the output"):
        rk.encode(model, tokenizer, path, path, field="body", overwrite=True)


# -- the command -------------------------------------------------------------------------------------------------------


def invoke(*arguments: object):
    return CliRunner().invoke(cli.app, ["encode", *(str(argument) for argument in arguments)])


def test_the_command(model, tokenizer, folder, file, tmp_path):
    result = invoke(file, tmp_path / "out.npy", "--model", folder, "--pooling", "cls", "--normalize", "--window", 16)
    assert result.exit_code == 0, result.output
    assert "tokens/s" in result.output
    assert "line 4: not JSON" in result.output
    assert "random values" not in result.stderr  # the pooler's, which is not used
    expected = rk.encode(model, tokenizer, file, pooling="cls", normalize=True, window=16)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected.embeddings)

    again = (file, tmp_path / "out.npy", "--model", folder, "--output-dtype", "float16", "--json")
    assert invoke(*again).exit_code == 2
    result = invoke(*again, "--overwrite", "--original", "--max-length", 16, "--batch-tokens", 64)
    report = json.loads(result.stdout)
    assert (report["texts"], report["bad"], report["packed"]) == (len(TEXTS), 2, False)
    assert np.load(tmp_path / "out.npy").dtype == np.float16


@pytest.mark.skipif(prepacked.unavailable() is not None, reason="no compiled CPU kernels")
def test_quantised(model, tokenizer, folder, file, tmp_path):
    plain = rk.encode(model, tokenizer, file)
    report = rk.encode(model, tokenizer, file, quantization="int8")
    assert report.quantization == "int8"
    assert report.packed
    assert "rounded to int8" in str(report)
    assert not rk.is_patched(model)
    good = ~np.isnan(plain.embeddings).any(1)
    errors = np.abs(report.embeddings - plain.embeddings)[good]
    assert 1e-5 < errors.max() < 0.3

    command = (file, tmp_path / "out.npy", "--model", folder, "--quantization", "int8")
    assert invoke(*command).exit_code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), report.embeddings)
    with pytest.raises(ValueError, match="does not patch"):
        rk.encode(model, tokenizer, file, quantization="int8", patch=False)
    result = invoke(file, tmp_path / "b.npy", "--model", folder, "--quantization", "int8", "--dtype", "bfloat16")
    assert result.exit_code == 2
    assert "float32 model on a CPU" in result.stderr


@pytest.mark.skipif(prepacked.unavailable() is not None, reason="no compiled CPU kernels")
def test_a_run_is_not_continued_with_other_weights(folder, file, tmp_path, monkeypatch):
    command = (file, tmp_path / "out.npy", "--model", folder, "--batch-tokens", 64, "--window", 8)
    with monkeypatch.context() as patched:
        Stop(patched, 3)
        invoke(*command)
    result = invoke(*command, "--quantization", "int8")
    assert result.exit_code == 2
    assert "kernels" in result.stderr


def test_the_command_interrupted_goes_on(folder, file, tmp_path, monkeypatch):
    command = (file, tmp_path / "out.npy", "--model", folder, "--batch-tokens", 64, "--window", 8)
    with monkeypatch.context() as patched:
        Stop(patched, 3)
        result = invoke(*command)
    assert result.exit_code == 130
    assert "the same command" in result.stderr
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    assert "by an earlier run" in result.output


def test_bad_commands_are_one_line(folder, file, tmp_path):
    for arguments, message in (
        ((tmp_path / "none.txt", "out.npy", "--model", folder), "No such file"),
        ((file, "out.csv", "--model", folder), ".npy or .parquet"),
        ((tmp_path, "out.npy", "--model", folder), "does not say its format"),
        ((tmp_path, "out.npy", "--model", folder, "--format", "text"), "Is a directory"),
        ((file, tmp_path / "no" / "out.npy", "--model", folder), "No such file"),
        ((file, "out.npy", "--model", tmp_path / "nowhere"), "no folder"),
        ((file, "out.npy", "--model", folder, "--max-length", 100), "the model takes 64"),
        ((file, "out.npy", "--model", folder, "--device", "abacus"), "no such device"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2, result.output
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert message in lines[0]
