"""What the machine code issues for each turn of a loop, from the disassembly (ptxas.disassemble).

A kernel's work is a loop around an instruction that one can count elsewhere (an exponential, a 16-byte load): its
anchor. `turn` finds the innermost loop that holds most of them, and the cheapest way through it that meets as many as a
way can: blocks that a branch can skip (a mask that is not needed, a barrier that is waited for again) are left out, so
what comes of it is a lower bound.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)


@dataclass(frozen=True)
class Turn:
    """Instructions of a warp on the cheapest way through a loop that meets most of its anchors."""

    instructions: int
    anchors: int
    by_opcode: dict[str, int]  # by the part before the first dot


def functions(disassembly: str) -> dict[str, dict[int, str]]:
    """Symbol -> address -> instruction."""
    found = {}
    for text in disassembly.split("Function : ")[1:]:
        found[text.split(None, 1)[0]] = {int(at, 16): code for at, code in _INSTRUCTION.findall(text)}
    return found


def opcode(instruction: str) -> str:
    """With its dots, without the predicate: "MUFU.EX2"."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def _blocks(code: dict[int, str]) -> tuple[list[list[int]], list[list[int]]]:
    """(addresses of each basic block, blocks that may follow it)."""
    addresses = sorted(code)
    target_of = {at: int(m[1], 16) for at in addresses if (m := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", code[at]))}
    starts = {addresses[0], *target_of.values()}
    starts |= {b for a, b in itertools.pairwise(addresses) if a in target_of or opcode(code[a]) == "EXIT"}
    blocks: list[list[int]] = []
    for at in addresses:
        if at in starts:
            blocks.append([])
        blocks[-1].append(at)
    number = {block[0]: i for i, block in enumerate(blocks)}
    following: list[list[int]] = []
    for i, block in enumerate(blocks):
        last = code[block[-1]]
        to = [number[target_of[block[-1]]]] if target_of.get(block[-1]) in number else []
        # BRA.DIV leaves where a warp has diverged, BRA.CONV where it has not.
        unconditional = re.match(r"(BRA|EXIT|RET)\b(?!\.DIV|\.CONV)", last) and not re.search(r"\bU?P\d", last)
        if not unconditional and i + 1 < len(blocks):
            to.append(i + 1)
        following.append(to)
    return blocks, following


def _loops(following: list[list[int]]) -> list[tuple[int, set[int]]]:
    """(first block, blocks) of each natural loop: Aho, Lam, Sethi and Ullman, Compilers, section 9.6."""
    before: list[list[int]] = [[] for _ in following]
    for i, to in enumerate(following):
        for j in to:
            before[j].append(i)
    everything = (1 << len(following)) - 1
    dominators = [1] + [everything] * (len(following) - 1)  # bits
    changed = True
    while changed:
        changed = False
        for i in range(1, len(following)):
            met = everything
            for j in before[i]:
                met &= dominators[j]
            if (new := met | 1 << i) != dominators[i]:
                dominators[i], changed = new, True
    loops: dict[int, set[int]] = {}
    for i, to in enumerate(following):
        for head in to:
            if not dominators[i] >> head & 1:
                continue
            body, reach = {head}, [i]
            while reach:
                at = reach.pop()
                if at not in body:
                    body.add(at)
                    reach += before[at]
            loops.setdefault(head, set()).update(body)
    return list(loops.items())


def turn(code: dict[int, str], anchor: str) -> Turn:
    """Of the innermost loop with the most anchors; of the whole function where no loop has one.

    anchor: a regular expression for the opcode. Raises ValueError where no instruction matches.
    """
    blocks, following = _blocks(code)
    anchors = [sum(re.fullmatch(anchor, opcode(code[at])) is not None for at in block) for block in blocks]
    if not any(anchors):
        raise ValueError(f"no instruction matches {anchor}")
    loops = [(head, body) for head, body in _loops(following) if any(anchors[i] for i in body)]
    held = [loop for loop in loops if not any(other < loop[1] for _, other in loops)]
    everything = (0, set(range(len(blocks))))
    head, body = max(held, key=lambda loop: sum(anchors[i] for i in loop[1]), default=everything)
    # To each block the way that meets most anchors, and of those the shortest; inner loops are gone through once.
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {head: (-anchors[head], len(blocks[head]), (head,))}
    ends, changed = [], [head]
    while changed:
        i = changed.pop(0)
        met, cost, way = best[i]
        if (held and head in following[i]) or (not held and not following[i]):
            ends.append(best[i])
        for j in following[i]:
            if j not in body or j == head or j in way:
                continue
            new = (met - anchors[j], cost + len(blocks[j]), (*way, j))
            if j not in best or new[:2] < best[j][:2]:
                best[j] = new
                changed.append(j)
    met, cost, way = min(ends)
    kinds = Counter(opcode(code[at]).split(".")[0] for i in way for at in blocks[i])
    return Turn(cost, -met, dict(kinds.most_common()))
