"""What the suite reads: the events of its parts, the outcomes of its tests, the card at hand."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_suite.jobs import Job


class Follower:
    """Reads what a part writes, as it comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reason = ""
        self._at = path.stat().st_size if path.is_file() else 0
        self._heard = time.monotonic()

    def events(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        with self.path.open() as stream:
            stream.seek(self._at)
            text = stream.read()
        whole = text[: text.rfind("\n") + 1]
        self._at += len(whole.encode())
        found = [json.loads(line) for line in whole.splitlines()]
        if found:
            self._heard = time.monotonic()
        for event in found:
            self.reason = event.get("reason", self.reason) if "poisoned" in event else self.reason
        return found

    def quiet(self) -> float:
        """Seconds since it said anything."""
        return time.monotonic() - self._heard


def failure_of(case: str, contender: str, reason: str) -> dict[str, Any]:
    """A contender that took its process with it. Ours are broken then; a peer is its maker's affair."""
    parts = case.split("-")
    ours = contender.startswith(("ours", "cuda", "triton", "cpu", "reference"))
    described = {"case": case, "contender": contender, "reason": reason, "broken": ours, "how": "ended the process"}
    if parts[0] != "model" and len(parts) == 5:
        described |= {"op": parts[0], "dtype": parts[2], "direction": parts[3], "batch": {"name": parts[4]}}
    return described


def outcomes(job: Job) -> dict[str, Any]:
    """Counts of a pytest job, what failed first, why tests were skipped, and what ran, from the plugin's file."""
    path = Path(job.environment["RK_SUITE_OUTCOMES"])
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "collected": 0}
    failed, reasons, served = [], [], {}
    ended = set()
    begun = None
    for event in events:
        counts["collected"] = event.get("collected", counts["collected"])
        begun = event.get("begin", begun)
        served = event.get("served", served)
        if "missing" in event:
            failed.append(event["missing"])
        if "test" in event:
            counts[event["outcome"]] += 1
            ended.add(event["test"])
            if event["outcome"] == "failed":
                failed.append(f"{event['test']}: {event['says']}")
            elif event["outcome"] == "skipped":
                reasons.append(event["says"])
    if job.status not in (0, 1, 5) and begun is not None and begun not in ended:
        failed.append(f"{begun}: did not end (status {job.status})")
    return {
        **counts,
        "seconds": round(job.seconds, 1),
        "out_of_time": job.late,
        "exit_status": job.status,
        "failures": failed[:20],
        "reasons": list(dict.fromkeys(reasons))[:5],
        "served": served,
    }


def card() -> dict[str, str] | None:
    """The first GPU as nvidia-smi names it: name, capability ("9.0"), driver, memory; None where there is none."""
    names = {"name": "name", "capability": "compute_cap", "driver": "driver_version", "memory": "memory.total"}
    command = ["nvidia-smi", f"--query-gpu={','.join(names.values())}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else None
