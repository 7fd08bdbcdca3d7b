"""A CrossEncoder on one of sentence-transformers' other backends, in a process of another environment.

optimum, which those backends need, goes with other versions of transformers than this package. So `.venv-optimum` has
the versions that go together (benchmarks/optimum.txt), and a process of its Python runs this file as a script, with no
more of this repository. For each call a line of JSON goes each way: there `{"ask": "scores", "question": ...}` or
`"rank"`, back `{"scores": [...]}`, `{}` or `{"error": ...}`. That takes less than a millisecond of calls of seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import weakref
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# By the name that sentence-transformers has for it; and the packages whose versions matter.
BACKENDS = {
    "onnx": ("onnxruntime", "optimum-onnx"),
    "openvino": ("openvino", "optimum-intel"),
}
_ALWAYS = ("transformers", "sentence-transformers", "torch")


class BackendProcess:
    """python: that environment's. model: folder of a CrossEncoder. passages: file of a JSON list.

    Raises RuntimeError with the last line of what the process wrote to stderr where it ends or an answer is an error.
    """

    def __init__(self, python: Path, backend: str, model: Path, passages: Path, threads: int) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [python, Path(__file__).resolve(), backend, model, passages, str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        weakref.finalize(self, self._process.kill)
        self.versions: dict[str, str] = self._answer()["versions"]

    def scores(self, question: str) -> torch.Tensor:
        """`[passages]`, before the sigmoid."""
        return torch.tensor(self._ask("scores", question)["scores"])

    def rank(self, question: str) -> None:
        self._ask("rank", question)

    def _ask(self, what: str, question: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # no answer comes then
            self._process.stdin.write(json.dumps({"ask": what, "question": question}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            said = self._log.read().strip().splitlines()
            raise RuntimeError(f"its process ended ({self._process.returncode}): {(said or ['no reason'])[-1]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


def _load(backend: str, model: str, threads: int) -> Any:
    from sentence_transformers import CrossEncoder

    options: dict[str, Any]
    if backend == "onnx":
        import onnxruntime

        session = onnxruntime.SessionOptions()
        session.intra_op_num_threads = threads
        options = {"provider": "CPUExecutionProvider", "export": True, "session_options": session}
    else:
        settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        options = {"export": True, "ov_config": settings}
    return CrossEncoder(model, backend=backend, device="cpu", model_kwargs=options)  # type: ignore[arg-type]


def main(backend: str, model: str, passages_file: str, threads: int) -> None:
    """Answers questions from stdin until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(threads)
    passages = json.loads(Path(passages_file).read_text())
    encoder = _load(backend, model, threads)
    versions = {name: metadata.version(name) for name in (*_ALWAYS, *BACKENDS[backend])}
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if asked["ask"] == "rank":
                encoder.rank(asked["question"], passages, show_progress_bar=False)
            else:
                pairs = [(asked["question"], passage) for passage in passages]
                found = encoder.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
                answer["scores"] = found.tolist()
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
