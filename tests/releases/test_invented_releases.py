"""The package in releases of transformers that nobody made yet: it can be imported, the answers are that release's own,
and what does not run fused is said."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import overlay
import pytest
from forks import TORCH, Forks
from invented_release import Release
from other_mathematics import OTHER_MATHEMATICS
from same_mathematics import SAME_MATHEMATICS

import roberta_kernels

HERE = Path(__file__).parent
INSTALLED = Release("installed", {})
RELEASES = [*SAME_MATHEMATICS, *OTHER_MATHEMATICS]
pytestmark = pytest.mark.releases


@pytest.fixture(scope="module")
def forks():
    made = Forks(*TORCH)
    yield made
    made.close()


def run(forks: Forks, release: Release, folder: Path) -> dict[str, Any]:
    """What happened in the scenario, in a process that imports this release."""
    path = [str(Path(roberta_kernels.__file__).parents[1])]
    if release.edits or release.moved:
        path.insert(0, str(overlay.make(folder / "release", release.edits, moved=release.moved)))
    job, happened = folder / "job.json", folder / "happened.json"
    job.write_text(json.dumps({"names": dict(release.names), "given": dict(release.given)}))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    done = forks.run(HERE / "scenario.py", job, happened, environment=environment)
    assert done.returncode == 0, f"{release.name}: the scenario broke ({done.returncode})\n{done.stderr[-5000:]}"
    result = json.loads(happened.read_text())
    invented = len(path) == 2
    assert result["transformers"].startswith(str(folder)) == invented, "another transformers was imported"
    return result


@pytest.fixture(scope="module")
def installed(forks, tmp_path_factory):
    return run(forks, INSTALLED, tmp_path_factory.mktemp("installed"))


def faults(release: Release, happened: dict[str, Any], usual: dict[str, Any]) -> list[str]:
    """Everything that is not as it must be, a line each."""
    if happened["import"] is not None:
        return [f"import roberta_kernels: {happened['import']}"]
    found = []
    for name, model in happened["models"].items():
        for problem in model["problems"]:
            if release.interface or not ("attn_implementation" in problem and "is not supported" in problem):
                found.append(f"{name}: {problem}")
        expected = usual["models"][name]
        for what, call in model["calls"].items():
            where = f"{name}, {what}"
            # Two arguments by position may mean something else there: another call, with answers of its own.
            other = what == "two by position" and happened["stock_sums"][where] != usual["stock_sums"][where]
            run_usually = call if other and call["ops"] else expected["calls"].get(what)
            found += _faults_of_call(where, release, call, run_usually, model["left"])
        for what, call in model.get("interface", {}).items():
            where = f"{name}, {what}, by the interface"
            found += _faults_of_call(where, release, call, expected["interface"].get(what), [])
        if release.fuses == "all" and model["left"] != expected["left"]:
            found.append(f"{name}: left {model['left']}")
        if release.fuses == "some" and not any(call["ops"] for call in model["calls"].values()):
            found.append(f"{name}: no op of ours ran in any call; left {model['left']}")
    if isinstance(happened["drop_in"], str):  # a class that is not the known code may be refused, with a reason
        if release.fuses != "none" or not happened["drop_in"].startswith("TypeError: "):
            found.append(f"FastRoberta: {happened['drop_in']}")
    else:
        found += [f"FastRoberta: {line}" for line in happened["drop_in"]]
    if happened["verify"] and (release.fuses != "none" or not happened["verify"].startswith("VerificationError: ")):
        found.append(f"verify: {happened['verify']}")
    return found


def _faults_of_call(
    where: str, release: Release, call: dict[str, Any], usual: dict[str, Any] | None, left: list[str]
) -> list[str]:
    if call["error"] is not None:
        return [f"{where}: {call['error']}"]
    found = [f"{where}: {difference}" for difference in call["differences"]]
    if usual is None or call["ops"] == usual["ops"]:  # a call that the installed release does not have
        return found
    if release.fuses == "all" and not where.endswith(release.unfused or "never"):
        found.append(f"{where}: ran {call['ops']}, expected {usual['ops']}; said {call['said']}; left {left}")
    if not call["said"] and not left:
        found.append(f"{where}: ran {call['ops']}, expected {usual['ops']}, and nothing was said")
    return found


def test_the_installed_release(installed):
    happened = installed
    assert happened["stock"] == {}
    assert faults(INSTALLED, happened, happened) == []
    for name, model in happened["models"].items():
        assert model["left"] == []
        assert all(call["ops"] for what, call in model["calls"].items()), name
        # Of a bare BERT, and of logits that anybody may read, padded rows are rows of their own.
        differ = name.startswith("Bert") and not name.endswith("SequenceClassification")
        said = ["position embeddings go on through padding"] if differ else []
        assert model["calls"]["right padding"]["said"] == said, name


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_invented_release(release, forks, installed, tmp_path):
    happened, usual = run(forks, release, tmp_path), installed
    assert happened["stock"] == {}, "the invented release must work by itself"
    # The edit must have the effect that it is there for, and no other. What comes by position may mean something else.
    changed = {
        name
        for name, sums in usual["stock_sums"].items()
        if happened["stock_sums"].get(name) != sums and not name.endswith("two by position")
    }
    assert bool(changed) == release.other_answers, changed
    found = faults(release, happened, usual)
    assert not found, f"{len(found)} faults\n" + "\n".join(found)


def test_an_overlay_leaves_the_installed_release_alone(tmp_path):
    source = tmp_path / "source" / "transformers"
    (source / "models" / "__pycache__").mkdir(parents=True)
    (source / "models" / "one.py").write_text("one = 1\n")
    (source / "models" / "two.py").write_text("two = 2\n")
    (source / "top.py").write_text("top = 0\n")
    made = overlay.make(
        tmp_path / "made",
        {"models/one.py": overlay.word("one", "uno")},
        moved={"models/two.py": "models/zwei.py"},
        source=source,
    )
    assert (made / "transformers" / "models" / "one.py").read_text() == "uno = 1\n"
    assert (made / "transformers" / "models" / "zwei.py").read_text() == "two = 2\n"
    assert not (made / "transformers" / "models" / "two.py").exists()
    assert not (made / "transformers" / "models" / "__pycache__").exists()
    assert (made / "transformers" / "top.py").is_symlink()
    assert (source / "models" / "one.py").read_text() == "one = 1\n"
    with pytest.raises(ValueError, match="must be there"):
        overlay.make(tmp_path / "again", {"top.py": overlay.sub("bottom", "top")}, source=source)
