"""loops.py reads the way through a loop from machine code as cuobjdump prints it."""

from __future__ import annotations

import loops
import pytest

# A loop over 0040 to 00e0 around another (a wait), with a part behind it that a branch leaves for and comes back from.
KERNEL = """
	Function : kernel
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   ISETP.GE.AND P0, PT, R2, 0x1, PT ;
        /*0020*/              @!P0 EXIT ;
        /*0030*/                   LDG.E.128 R4, [R2] ;
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R6], R7 ;
        /*0050*/              @!P1 BRA 0x40 ;
        /*0060*/               @P2 BRA 0x100 ;
        /*0070*/                   MUFU.EX2 R8, R8 ;
        /*0080*/                   MUFU.EX2 R9, R9 ;
        /*0090*/                   BRA.DIV UR4, 0x160 ;
        /*00a0*/                   FADD R8, R8, R9 ;
        /*00b0*/               @P3 BRA 0xd0 ;
        /*00c0*/                   FMUL R8, R8, R9 ;
        /*00d0*/                   IADD3 R2, R2, 0x1, RZ ;
        /*00e0*/               @P0 BRA 0x40 ;
        /*00f0*/                   EXIT ;
        /*0100*/                   FSEL R8, R8, R9, P4 ;
        /*0110*/                   BRA 0x70 ;
        /*0160*/                   WARPSYNC.COLLECTIVE R1, 0x170 ;
        /*0170*/                   BRA 0xa0 ;
"""


def test_a_turn_is_the_cheapest_way_that_meets_the_anchors() -> None:
    code = loops.functions(KERNEL)["kernel"]
    turn = loops.turn(code, r"MUFU\.EX2")
    # 40 to b0, d0, e0: without what is masked, what has diverged, and what P3 skips.
    assert (turn.instructions, turn.anchors) == (10, 2)
    assert turn.by_opcode["BRA"] == 5
    assert "FSEL" not in turn.by_opcode
    assert "FMUL" not in turn.by_opcode


def test_what_no_loop_holds_is_counted_over_the_function() -> None:
    turn = loops.turn(loops.functions(KERNEL)["kernel"], r"LDG\.E\.128")
    assert turn.anchors == 1
    assert turn.by_opcode["MOV"] == 1


def test_an_anchor_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="HGMMA"):
        loops.turn(loops.functions(KERNEL)["kernel"], "HGMMA.*")
