"""pytest's side of the benchmarks: options, the list of cases, the session's roofs, and what goes into the JSON."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from benchmarks import machine, options
from benchmarks.contenders import entries
from benchmarks.problem import Entry
from benchmarks.roofs import measure_roofs
from benchmarks.runner import Result, ratio, run_case
from benchmarks.timing import FULL, GPU, QUICK, Clock
from benchmarks.workloads import Case, described, plan

SCHEMA = 1


class Session:
    """What the tests of a run share. The first test of a case measures all its contenders; the rest look theirs up."""

    def __init__(self, config: pytest.Config) -> None:
        # Without timing (--benchmark-disable, the default here) every contender is called once: small shapes do.
        disabled = config.getoption("benchmark_disable") and not config.getoption("benchmark_enable")
        self.quick = config.getoption("--quick") or disabled
        self.device = machine.pick_device(config.getoption("--device"))
        self.backends = tuple(config.getoption("--backend") or ())
        self.compiled = not config.getoption("--no-compile")
        self.load_average = machine.load_average()
        if self.quick:
            torch.set_num_threads(1)  # no speed is claimed, and on a busy machine threads wait for each other
        self.rotate = not config.getoption("--no-rotation")
        self.wanted: dict[Case, dict[str, Entry]] = defaultdict(dict)
        self.failures: list[dict[str, Any]] = []
        self.roofs: dict[str, Any] | None = None
        self._measured: tuple[Case, dict[str, Result]] | None = None
        self._config = config

    def cases(self) -> list[Case]:
        get = self._config.getoption
        return plan(
            self.device,
            quick=self.quick,
            everything=get("--everything"),
            ops=get("--op") or (),
            sizes=get("--size") or (),
            batches=get("--batch") or (),
            directions=get("--direction") or (),
            dtypes=get("--dtype") or (),
        )

    def entries(self, case: Case) -> dict[str, Entry]:
        # A quick run compiles once for each direction of one op: enough to see that the row is there.
        compiled = self.compiled and (not self.quick or case.op == "add_layer_norm")
        return entries(case, wanted_backends=self.backends, compiled=compiled)

    def result(self, case: Case, name: str) -> Result:
        if self.roofs is None:
            self.clock = Clock(self.device)
            dtypes = dict.fromkeys(wanted.dtype_name for wanted in self.wanted)
            self.roofs = measure_roofs(self.device, dtypes, self.clock, quick=self.quick)
        if self._measured is None or self._measured[0] != case:
            self._measured = None
            effort = QUICK if self.quick else GPU if self.device == "cuda" else FULL
            found = run_case(case, self.wanted[case], self.roofs, self.clock, effort, rotate=self.rotate)
            self._measured = (case, found)
        result = self._measured[1][name]
        if result.samples is None:
            self.failures.append({**described(case), "contender": name, "reason": result.reason})
        return result


SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add_options(parser.getgroup("roberta_kernels benchmarks").addoption)


def pytest_configure(config: pytest.Config) -> None:
    try:
        config.stash[SESSION] = Session(config)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "contender"} <= set(metafunc.fixturenames):
        session = metafunc.config.stash[SESSION]
        found = [(case, name) for case in session.cases() for name in session.entries(case)]
        ids = [f"{case.id}-{name.replace(' ', '_')}" for case, name in found]
        metafunc.parametrize(("case", "contender"), found, ids=ids)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Only what was selected (-k, a node id) takes part in the turns."""
    shared = session.config.stash[SESSION]
    for item in session.items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if {"case", "contender"} <= set(params):
            case, name = params["case"], params["contender"]
            shared.wanted[case][name] = shared.entries(case)[name]


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest) -> Session:
    return request.config.stash[SESSION]


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return machine.machine(config.stash[SESSION].device)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    session = config.stash[SESSION]
    by_case: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in output_json["benchmarks"]:
        # Every single call, and what extra_info says again.
        row["stats"].pop("data", None)
        row.pop("params", None)
        row.pop("param", None)
        if "case" in row["extra_info"]:
            by_case[row["extra_info"]["case"]].append(row["extra_info"])
    for rows in by_case.values():
        for ours in (row for row in rows if row["ours"]):
            ours["ratios"] = {row["contender"]: ratio(ours, row) for row in rows if not row["ours"]}
    output_json |= {
        "roberta_kernels_schema": SCHEMA,
        "quick": session.quick,
        "versions": machine.versions(),
        "load_average_at_start": session.load_average,
        "roofs": session.roofs,
        "failures": session.failures,
    }
