"""The parts of the suite that use the GPU, each in a process of its own: `python -m benchmarks.gpu_suite.child ORDER`.

A kernel that fails can take the process's whole use of the GPU with it, and one that hangs never returns. So the suite
itself never touches the GPU; a part writes each result as it has it, one JSON object a line, and before each contender
what comes next. When it ends early, or says nothing for too long, the suite knows whose fault it was and starts the
part again without that contender.

ORDER is a JSON file: "part" (machine, kernels, models or prepare), "events" (the file to write), "device", "smoke",
"slot", "deadline" (of time.time()), "roofs", "measure_roofs", "done" (cases), "excluded" (pairs of a case, or "op-*",
and a contender).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

POISONED = 75  # exit status: the GPU refuses this process


class Part:
    def __init__(self, order: dict[str, Any]) -> None:
        self.order = order
        self.device: str = order["device"]
        self.smoke: bool = order["smoke"]
        self.slot: int = order["slot"]
        self.deadline: float = order["deadline"]
        self._done = set(order.get("done", ()))
        self._excluded = {tuple(pair) for pair in order.get("excluded", ())}
        self._said: tuple[str, str] | None = None

    def write(self, **event: Any) -> None:
        with open(self.order["events"], "a") as stream:
            stream.write(json.dumps(event) + "\n")

    def begin(self, case: str, contender: str) -> None:
        if self._said != (case, contender):
            self._said = (case, contender)
            self.write(begin=[case, contender])

    def excluded(self, case: str, contender: str) -> bool:
        return bool({(case, contender), (f"{case.partition('-')[0]}-*", contender)} & self._excluded)

    def late(self) -> bool:
        return time.time() > self.deadline

    # -- parts --------------------------------------------------------------------------------------------------------

    def machine(self) -> None:
        from benchmarks import machine
        from benchmarks.roofs import measure_roofs
        from benchmarks.timing import Clock
        from roberta_kernels import backends
        from roberta_kernels.backends import choosing

        if self.device == "cuda":
            import torch

            torch.zeros(1, device="cuda")  # CUDA is initialised: the table knows the architecture
        self.write(
            machine=machine.machine(self.device),
            versions=machine.versions(),
            backends={name: [bool(s), s.detail] for name, s in backends.available_backends().items()},
            choices=backends.choices(),
            variants=choosing.VARIANTS,
        )
        if self.order["measure_roofs"]:
            dtypes = ("float32",) if self.smoke else ("bfloat16", "float16", "float32")
            self.write(roofs=measure_roofs(self.device, dtypes, Clock(self.device), quick=self.smoke))

    def kernels(self, *, timed: bool = True) -> None:
        import torch

        from benchmarks import contenders, timing
        from benchmarks.runner import Poisoned, call_once, check_gpu, first_line, ratio, run_case
        from benchmarks.workloads import described, suite_plan

        torch._dynamo.config.recompile_limit = 64
        clock = timing.Clock(self.device)
        effort = timing.QUICK if self.smoke else timing.GPU
        backends = ["reference"] if self.smoke else []
        seen = set()
        for case in suite_plan(self.device, self.slot, smoke=self.smoke):
            if case.id in self._done:
                continue
            # Attention under torch.compile is scaled_dot_product_attention again.
            entries = contenders.entries(
                case,
                wanted_backends=backends,
                compiled=case.op != "attention" and not self.smoke,
                everywhere=self.smoke,
            )
            entries = {name: entry for name, entry in entries.items() if not self.excluded(case.id, name)}
            if self.late():
                for name in entries:
                    self._failed(described(case), name, "no time left")
                continue
            if not timed:  # the first of a kind makes what the others use, too
                key = (case.op, case.size.name, case.dtype_name, case.direction)
                for entry in entries.values():
                    if key not in seen and not self.late():
                        try:
                            call_once(case, entry)
                        except Exception:
                            check_gpu(self.device)
                seen.add(key)
                continue
            while entries:
                try:
                    results = run_case(
                        case,
                        entries,
                        self.order["roofs"],
                        clock,
                        effort,
                        check_all=True,
                        begin=lambda name, case=case: self.begin(case.id, name),
                    )
                except Poisoned:
                    raise
                except Exception as error:  # while being timed, or out of memory: the others go again
                    check_gpu(self.device)
                    culprit = self._said[1] if self._said and self._said[0] == case.id else None
                    if culprit not in entries:  # the data, or the float64 answers
                        for name in entries:
                            self._failed(described(case), name, f"the case itself failed: {first_line(error)}")
                        break
                    ours = entries.pop(culprit).ours
                    self._failed(described(case), culprit, first_line(error), broken=ours)
                    continue
                rows = {}
                for name, result in results.items():
                    if result.samples is None:
                        self._failed(described(case), name, result.reason, broken=result.broken)
                    else:
                        rows[name] = {**described(case), "contender": name, **result.figures}
                for row in rows.values():
                    if row["ours"]:
                        row["ratios"] = {name: ratio(row, peer) for name, peer in rows.items() if not peer["ours"]}
                    self.write(row=row)
                break
            self.write(done=case.id)
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def models(self, *, timed: bool = True) -> None:
        from benchmarks import timing
        from benchmarks.models import run_models, runners
        from benchmarks.workloads import suite_models

        effort = timing.QUICK if self.smoke else timing.GPU
        for direction, batches in suite_models(self.slot, smoke=self.smoke):
            for event in run_models(
                batches,
                device=self.device,
                roofs=self.order["roofs"],
                effort=effort if timed else None,
                deadline=self.deadline,
                smoke=self.smoke,
                known=runners(self.device, smoke=self.smoke, quick=self.slot == 1),
                directions=(direction,),
                done=self._done,
                excluded=self.excluded,
                begin=self.begin,
            ):
                if timed:
                    self.write(**event)

    def prepare(self) -> None:
        """Compiles what the others will need, into the caches of Triton and torch.compile, while the tests run."""
        self.kernels(timed=False)
        self.models(timed=False)

    def _failed(self, described: dict[str, Any], name: str, reason: str, *, broken: bool = False) -> None:
        self.write(failure={**described, "contender": name, "reason": reason, "broken": broken})


def main(path: str) -> int:
    order = json.loads(Path(path).read_text())
    part = Part(order)
    import torch

    if order["smoke"]:
        torch.set_num_threads(1)
    from benchmarks.runner import Poisoned

    try:
        getattr(part, order["part"])()
    except Poisoned as error:
        case, contender = part._said or ("", "")
        part.write(poisoned=[case, contender], reason=str(error))
        return POISONED
    part.write(finished=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
