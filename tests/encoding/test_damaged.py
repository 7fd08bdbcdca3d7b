"""What a crash of the machine or a full disk leaves of a run: what is not as it was written is encoded again."""

from __future__ import annotations

import pytest

import roberta_kernels as rk
from encoding.cases import SMALL, TEXTS, Stop
from roberta_kernels.encoding import outputs, state

HEADER, ROW = 128, 32 * 4  # bytes


def cut(keep: float):
    def damage(partial, errors):
        partial.write_bytes(partial.read_bytes()[: int(keep * partial.stat().st_size)])

    return damage


def cut_and_grown(partial, errors):
    """As a file system leaves what it had not written: of the right length, and zeros."""
    whole = partial.read_bytes()
    partial.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))


def flipped(row: int):
    def damage(partial, errors):
        content = bytearray(partial.read_bytes())
        content[HEADER + row * ROW + 5] ^= 1
        partial.write_bytes(content)

    return damage


def gone(partial, errors):
    partial.unlink()


def header(partial, errors):
    content = partial.read_bytes()
    partial.write_bytes(bytes(16) + content[16:])


def errors_cut(partial, errors):
    errors.write_bytes(errors.read_bytes()[:-3])


def errors_changed(partial, errors):
    errors.write_bytes(errors.read_bytes().replace(b"not JSON", b"NOT JSON"))


def errors_gone(partial, errors):
    errors.unlink()


DAMAGES = {
    "empty": cut(0),
    "header only": cut(0.02),
    "cut in the middle": cut(0.5),
    "the last bytes lost": cut(0.99),
    "zeros at the end": cut_and_grown,
    "first row": flipped(0),
    "row 17": flipped(17),
    "gone": gone,
    "errors cut": errors_cut,
    "errors changed": errors_changed,
    "errors gone": errors_gone,
}


@pytest.fixture
def whole(model, tokenizer, file, tmp_path):
    rk.encode(model, tokenizer, file, tmp_path / "whole.npy", **SMALL)
    return tmp_path / "whole.npy"


def interrupt(model, tokenizer, file, path, monkeypatch, after):
    with monkeypatch.context() as patched:
        Stop(patched, after)
        with pytest.raises(KeyboardInterrupt):
            rk.encode(model, tokenizer, file, path, **SMALL)


@pytest.mark.parametrize(
    ("damage", "block"),
    [*((damage, 1) for damage in DAMAGES), *((damage, 8192) for damage in ("cut in the middle", "errors cut"))],
)
def test_what_is_damaged_is_encoded_again(model, tokenizer, file, whole, tmp_path, monkeypatch, damage, block):
    monkeypatch.setattr(state, "BLOCK_ROWS", block)
    path = tmp_path / "out.npy"
    partial, errors = (outputs.beside(path, suffix) for suffix in (".partial", ".errors.jsonl"))
    interrupt(model, tokenizer, file, path, monkeypatch, 12)
    undamaged = partial.read_bytes() if partial.exists() else b"", errors.read_bytes()
    DAMAGES[damage](partial, errors)
    assert not partial.exists() or not errors.exists() or (partial.read_bytes(), errors.read_bytes()) != undamaged
    report = rk.encode(model, tokenizer, file, path, **SMALL)
    assert path.read_bytes() == whole.read_bytes()
    assert errors.read_bytes() == outputs.beside(whole, ".errors.jsonl").read_bytes()
    assert report.texts == len(TEXTS)
    assert report.damaged > 0
    assert f"{report.damaged} rows of the earlier run, encoded again" in str(report)
    if block == 1 and damage in ("the last bytes lost", "row 17"):  # the first windows are as they were
        assert report.resumed >= 16


def test_every_row_that_is_done_is_checked(model, tokenizer, file, whole, tmp_path, monkeypatch):
    """Whatever the state claims, of the windows and of the batches of the one that was begun."""
    path = tmp_path / "out.npy"
    partial = outputs.beside(path, ".partial")
    interrupt(model, tokenizer, file, path, monkeypatch, 9)
    claimed = {p: p.read_bytes() for p in tmp_path.iterdir()}
    content = claimed[partial]
    damaged = 0
    for row in range(0, (len(content) - HEADER) // ROW, 5):
        for p, saved in claimed.items():
            p.write_bytes(saved)
        part = bytearray(content)
        part[HEADER + row * ROW : HEADER + (row + 1) * ROW] = bytes(ROW)
        partial.write_bytes(part)
        report = rk.encode(model, tokenizer, file, path, **SMALL)
        assert path.read_bytes() == whole.read_bytes(), row
        damaged += report.damaged > 0
        path.unlink()
    assert damaged > 4


def test_no_more_than_what_follows_the_damage_is_encoded_again(model, tokenizer, file, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(state, "BLOCK_ROWS", 1)
    path = tmp_path / "out.npy"
    interrupt(model, tokenizer, file, path, monkeypatch, 12)
    before = Stop(monkeypatch)
    rk.encode(model, tokenizer, file, path, **SMALL)
    undamaged = before.calls
    path.unlink()
    interrupt(model, tokenizer, file, path, monkeypatch, 12)
    flipped(17)(outputs.beside(path, ".partial"), None)  # of the second window
    again = Stop(monkeypatch)
    report = rk.encode(model, tokenizer, file, path, **SMALL)
    assert undamaged < again.calls < undamaged + 12
    assert report.resumed == 16
    assert path.read_bytes() == whole.read_bytes()


def test_checksums_are_of_blocks_of_windows():
    done = state.State()
    ends = []
    for _ in range(40):
        closed, last = done.open_block()
        done = state.State((*closed, state.Block(rows=last.rows + 1000)))
        ends = [block.rows for block in done.blocks]
    assert ends == [9000, 18000, 27000, 36000, 40000]
    assert (
        state.State.from_json(
            __import__("json").loads(__import__("json").dumps(__import__("dataclasses").asdict(done)))
        )
        == done
    )
