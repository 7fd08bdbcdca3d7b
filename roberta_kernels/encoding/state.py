"""How far a run of encode() is, with checksums of what it has done: what OUT.state.json holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

BLOCK_ROWS = 8192  # rows, at least, that share a checksum once their windows are done


@dataclass(frozen=True)
class Counts:
    """Sums over the rows so far. plain_padding: of batches of 32 in input order. padding: that was computed here."""

    tokens: int = 0
    padding: int = 0
    plain_padding: int = 0
    bad: int = 0
    truncated: int = 0

    def plus(self, **more: int) -> Counts:
        return replace(self, **{name: getattr(self, name) + value for name, value in more.items()})


@dataclass(frozen=True)
class Block:
    """Whole windows one after another: what the output holds up to their end, and checksums (CRC-32) of their part.

    rows, counts, errors_bytes: from the beginning of the output. checksum: of the block's own rows. errors_checksum: of
    what its windows wrote to the errors file.
    """

    rows: int = 0
    counts: Counts = field(default_factory=Counts)
    errors_bytes: int = 0
    checksum: int = 0
    errors_checksum: int = 0


@dataclass(frozen=True)
class State:
    """How far a run is. Replaced as a whole, never changed, so that no interrupt finds it half changed.

    blocks: of the windows that are done. batches: a checksum of each batch that is done in the window that begins
    there. seconds: spent up to here.
    """

    blocks: tuple[Block, ...] = ()
    batches: tuple[int, ...] = ()
    seconds: float = 0.0

    @property
    def end(self) -> Block:
        return self.blocks[-1] if self.blocks else Block()

    @property
    def rows(self) -> int:
        return self.end.rows

    @property
    def counts(self) -> Counts:
        return self.end.counts

    def open_block(self) -> tuple[tuple[Block, ...], Block]:
        """The blocks that are closed, and the one that the next window goes into: the last, until it is long enough."""
        begin = self.blocks[-2].rows if len(self.blocks) > 1 else 0
        if self.blocks and self.rows - begin < BLOCK_ROWS:
            return self.blocks[:-1], self.blocks[-1]
        return self.blocks, replace(self.end, checksum=0, errors_checksum=0)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> State:
        """Raises TypeError, KeyError or AttributeError for what is none."""
        blocks = tuple(Block(**{**block, "counts": Counts(**block["counts"])}) for block in saved["blocks"])
        state = cls(blocks, tuple(saved["batches"]), saved["seconds"])
        numbers = [*state.batches]
        for block in blocks:
            numbers += [
                block.rows,
                block.errors_bytes,
                block.checksum,
                block.errors_checksum,
                *asdict(block.counts).values(),
            ]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise TypeError("not all are counts")
        return state


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """In words, what differs between two descriptions of what a run depends on."""
    return [
        f"{key} (was {_short(before.get(key))}, is {_short(now.get(key))})"
        for key in {**now, **before}
        if before.get(key) != now.get(key)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else text[:12] + "..."
