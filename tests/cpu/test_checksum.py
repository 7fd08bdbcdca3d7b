"""checksum_weights: any edit shows in the part that it is in, and a weight in a file is not read into memory."""

from __future__ import annotations

import pathlib

import pytest
import torch

PARTS = 16


def sums(kernels, weights, first=0, count=PARTS, in_file=0):
    return kernels.checksum_weights(weights, [in_file] * len(weights), [first] * len(weights), count, PARTS)


def shows(kernels, weight, edit):
    """In which parts an edit shows."""
    before = sums(kernels, [weight])[0]
    edit(weight)
    return torch.nonzero(sums(kernels, [weight])[0] != before).flatten().tolist()


def test_every_element_shows_in_its_part(kernels):
    for shape in ((31, 17), (PARTS, 64), (5,), (3, 1)):
        weight = torch.randn(shape)
        found = [shows(kernels, weight.view(-1), lambda w, i=i: w[i].neg_()) for i in range(weight.numel())]
        assert all(len(parts) == 1 for parts in found)
        assert found == sorted(found), "parts are in order"
        sizes = [found.count([part]) for part in range(PARTS)]
        assert max(sizes) - min(sizes) <= 1, "and as large as each other"


def test_edits_that_a_sum_would_miss(kernels):
    weight = torch.randn(64, 32)
    edited = [weight[torch.randperm(64)], -weight, weight.flip(1)]
    for a, b in ((0, 1), (0, 2), (0, 8), (3, 11), (1, 31)):
        signs, swapped = weight.clone(), weight.clone()
        signs[0, [a, b]] *= -1
        swapped[:, [a, b]] = weight[:, [b, a]]
        edited += [signs, swapped]
    before = sums(kernels, [weight])
    for other in edited:
        assert not torch.equal(other, weight)
        assert not torch.equal(sums(kernels, [other]), before)


def test_parts_one_by_one_are_all_of_them(kernels):
    weights = [torch.randn(37, 11), torch.randn(3), torch.empty(0, 3), torch.randn(640, 100)]
    whole = sums(kernels, weights)
    assert whole.shape == (4, PARTS)
    assert torch.equal(whole, sums(kernels, [w.clone() for w in weights]))
    for part in range(PARTS):
        assert torch.equal(sums(kernels, weights, part, 1)[:, 0], whole[:, part])
    mixed = kernels.checksum_weights(weights, [0] * 4, [3, 0, 5, 15], 1, PARTS)
    assert torch.equal(mixed[:, 0], whole[range(4), [3, 0, 5, 15]])
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - threads if threads in (1, 2) else 1)
    assert torch.equal(sums(kernels, weights), whole)
    torch.set_num_threads(threads)


def test_bad_arguments(kernels):
    weight = torch.randn(4, 6)
    for arguments in (
        ([], [], [], 1, 4),
        ([weight], [0, 0], [0], 1, 4),
        ([weight], [0], [4], 1, 4),
        ([weight], [0], [-1], 1, 4),
        ([weight], [0], [1], 4, 4),
        ([weight], [0], [0], 0, 4),
        ([weight.t()], [0], [0], 1, 4),
    ):
        with pytest.raises(RuntimeError, match="checksum_weights"):
            kernels.checksum_weights(*arguments)


def resident(tensor):
    """Bytes of a mapping that are in memory."""
    lines = pathlib.Path("/proc/self/smaps").read_text().splitlines()
    start = f"{tensor.data_ptr():x}-"
    at = next(i for i, line in enumerate(lines) if line.startswith(start))
    return next(int(line.split()[1]) for line in lines[at:] if line.startswith("Rss:")) << 10


@pytest.mark.skipif(not pathlib.Path("/proc/self/pagemap").exists(), reason="no /proc/self/pagemap")
def test_a_weight_in_a_file_stays_there(kernels, tmp_path):
    rows, columns = 64, 1024  # a row is a page
    path = tmp_path / "weight"
    torch.randn(rows, columns).numpy().tofile(path)
    weight = torch.from_file(str(path), shared=False, size=rows * columns).view(rows, columns)
    untouched = sums(kernels, [weight], in_file=1)
    assert resident(weight) == 0, "nothing of it was read"
    assert torch.equal(sums(kernels, [weight], in_file=1), untouched)
    weight.sum()
    assert resident(weight) > 0
    assert torch.equal(sums(kernels, [weight], in_file=1), untouched), "reading changes nothing"
    for row, column in ((0, 0), (17, 5), (63, 1023)):
        before = sums(kernels, [weight], in_file=1)
        weight.numpy()[row, column] += 1
        after = sums(kernels, [weight], in_file=1)
        assert torch.nonzero(after[0] != before[0]).flatten().tolist() == [row * PARTS // rows]
        weight.numpy()[row, column] += 1
        assert not torch.equal(sums(kernels, [weight], in_file=1), after), "a page that was written to before"
