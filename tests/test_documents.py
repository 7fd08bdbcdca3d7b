"""The documents name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_test_that_the_compatibility_tables_name_exists():
    named, missing, file = 0, [], ""
    for row in (ROOT / "docs/compatibility.md").read_text().splitlines():
        if not row.startswith("|"):
            continue
        for reference in re.findall(r"`((?:[\w/]*test_\w+\.py)?(?:::\w+(?:\[[^`]*\])?)?)`", row):
            if not reference:
                continue
            path, _, test = reference.partition("::")
            file = path or file  # "::test_it" stands for the file that was named last
            source = ROOT / file if "/" in file else ROOT / "tests/models" / file
            named += 1
            if not source.exists() or f"def {test.split('[')[0]}" not in source.read_text():
                missing.append(reference)
    assert named > 100
    assert missing == []
