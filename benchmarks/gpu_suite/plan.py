"""What the GPU suite does in which slot: stages with their time, the test processes, and what each of these proves.

Plain data and functions of it, without torch: read by the suite, by `choose`, and by the tests of both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

# That have CUDA C++ kernels. (This process imports no torch, so it cannot ask.)
CUDA_OPS = ("attention", "add_layer_norm", "gelu_ffn", "embedding_layer_norm")
LIMIT = 570.0  # seconds of a slot: machines are lent for ten minutes a command


@dataclass(frozen=True)
class Stage:
    """most: seconds that it may take. kept: what is kept for it when those before it take all they may."""

    name: str
    most: float
    kept: float


# Each slot is of use alone. What is measured in which: workloads.suite_plan and workloads.suite_models.
SLOTS = {
    1: (
        Stage("build", 200.0, 0.0),
        Stage("machine", 45.0, 20.0),
        Stage("variants", 60.0, 30.0),
        Stage("tests", 130.0, 90.0),
        Stage("kernels", 130.0, 90.0),
        Stage("models", 150.0, 90.0),
    ),
    2: (
        Stage("build", 200.0, 0.0),
        Stage("machine", 45.0, 20.0),
        Stage("kernels", 280.0, 150.0),
        Stage("models", 280.0, 120.0),
    ),
    3: (
        Stage("build", 200.0, 0.0),
        Stage("machine", 45.0, 20.0),
        Stage("sanitizer", 220.0, 120.0),
        Stage("triton", 330.0, 150.0),
    ),
}
STAGES = tuple(dict.fromkeys(stage.name for stages in SLOTS.values() for stage in stages))
ENDING = 12.0  # seconds kept for the report

# Where tests for a GPU are. Which tests of them those are, the mark `gpu` says.
GPU_TESTS = ("tests/ops", "tests/models/test_on_gpu.py", "tests/triton")
SANITIZERS = ("memcheck", "racecheck")
OUR_KERNELS = "2rk4cuda"  # what their mangled names hold, those of CUTLASS with our epilogues too


@dataclass(frozen=True)
class Tests:
    """One selection of tests: what pytest is given, and what their passing proves.

    backend: whose tests of the selection run ("cuda", "triton"; "others": neither's), and of which they are the proof.
    op, variant: of which they are it; None: of all. forced: the variant is set for the whole process; else the tests
    set it. shards: processes that share the tests. take: so many, spread evenly over all of them. tool: a sanitizer.
    """

    name: str
    paths: tuple[str, ...]
    backend: str
    op: str | None = None
    variant: str | None = None
    forced: bool = False
    left_out: tuple[str, ...] = ()  # files of the paths
    expression: str | None = None  # as pytest's -k
    shards: int = 1
    take: int = 0
    tool: str | None = None

    def described(self) -> dict[str, Any]:
        return {"backend": self.backend, "op": self.op, "variant": self.variant, "tool": self.tool}


def variant_tests(variants: dict[str, list[str]]) -> list[Tests]:
    """First of all, in seconds: every variant of an op, in a process of its own."""
    return [
        Tests(
            f"{op} {variant}",
            ("tests/ops/test_variants.py",),
            "cuda",
            op,
            variant,
            expression=f"{op} and cuda-{variant}",
        )
        for op, known in variants.items()
        for variant in known
    ]


def backend_tests(variants: dict[str, list[str]]) -> list[Tests]:
    """All tests on the GPU but Triton's: of each op with each variant, then the rest of the cuda backend, then what
    both backends stand on.
    """
    found: list[Tests] = []
    variant: str | None
    for op in CUDA_OPS:
        file = (f"tests/ops/test_{op}.py",)
        for variant in variants.get(op, [None]):
            name = f"{op} cuda {variant}" if variant else f"{op} cuda"
            found.append(Tests(name, file, "cuda", op, variant, forced=variant is not None, shards=2))
    done = tuple(f"tests/ops/test_{name}.py" for name in (*CUDA_OPS, "variants"))
    found.append(Tests("cuda", GPU_TESTS, "cuda", left_out=done, shards=4))
    found.append(Tests("others", GPU_TESTS, "others", shards=4))
    return found


def triton_tests() -> list[Tests]:
    """Each compiles kernels, some 400 in all: many processes, which share what they compiled."""
    return [Tests("triton", GPU_TESTS, "triton", shards=24)]


def sanitizer_tests(variants: dict[str, list[str]]) -> list[Tests]:
    """Of each variant those tests that see to it that it runs; of an op without variants some of its own."""
    found = []
    for tool in SANITIZERS:
        for op in CUDA_OPS:
            if op not in variants:
                file = (f"tests/ops/test_{op}.py",)
                found.append(Tests(f"{tool} {op}", file, "cuda", op, take=6, tool=tool))
            for variant in variants.get(op, ()):
                expression = f"{op}_three_way and cuda-{variant}"
                found.append(
                    Tests(
                        f"{tool} {op} {variant}",
                        ("tests/ops/test_variants.py",),
                        "cuda",
                        op,
                        variant,
                        expression=expression,
                        take=5,
                        tool=tool,
                    )
                )
    return found


def selects(tests: Tests, file: str) -> bool:
    """Whether it looks at the tests of a file (relative to the project); the mark `gpu` and the backend decide then."""
    inside = any(file == path or file.startswith(f"{path}/") for path in tests.paths)
    return inside and file not in tests.left_out


def variants_on(known: dict[str, tuple[str, ...]], capability: str) -> dict[str, list[str]]:
    """Of each op the variants that a GPU of this compute capability can run; a build that lacks one of them is a
    failure.
    """
    return {op: [v for v in names if v != "sm90" or capability == "9.0"] for op, names in known.items()}


# -- what came of the tests -------------------------------------------------------------------------------------------


def verdict(outcomes: list[dict[str, Any]]) -> tuple[str, str]:
    """("passed", "failed" or "late", why) of the processes of one selection. That no test passed is a failure: it
    proves nothing.
    """
    broken = [o for o in outcomes if o["failed"] or (not o["out_of_time"] and o["exit_status"] not in (0, 5))]
    if broken:
        first = next((text for o in broken for text in o["failures"]), f"exit status {broken[0]['exit_status']}")
        return "failed", first
    if any(o["out_of_time"] for o in outcomes):
        return "late", "out of time"
    if not any(o["passed"] for o in outcomes):
        reasons = [reason for o in outcomes for reason in o["reasons"]]
        return "failed", f"no test ran: {reasons[0]}" if reasons else "no test ran"
    return "passed", ""


def merged_outcomes(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all processes of a selection together."""
    first, *others = outcomes
    found = {**first, "failures": list(first["failures"]), "reasons": list(first["reasons"])}
    found["served"] = dict(first["served"])
    for other in others:
        for key in ("passed", "failed", "skipped", "collected"):
            found[key] += other[key]
        found["seconds"] = max(found["seconds"], other["seconds"])
        found["out_of_time"] |= other["out_of_time"]
        found["failures"] += other["failures"]
        found["reasons"] += other["reasons"]
        found["exit_status"] = found["exit_status"] or other["exit_status"]
        for what, count in other["served"].items():
            found["served"][what] = found["served"].get(what, 0) + count
    found["reasons"] = list(dict.fromkeys(found["reasons"]))[:5]
    found["failures"] = found["failures"][:20]
    return json.loads(json.dumps(found))
