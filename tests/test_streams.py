"""The command as a process: no traceback and the right exit status, whatever becomes of it and of its streams."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import roberta_kernels as rk

COMMAND = [sys.executable, "-m", "roberta_kernels"]
INTERRUPTED = 130

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and descriptors as POSIX has them")


@pytest.fixture
def environment(tmp_path):
    """With the package in the path, and a folder whose sitecustomize.py runs first."""
    folder = tmp_path / "site"
    folder.mkdir()
    package = Path(rk.__file__).resolve().parent.parent
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(package), os.environ.get("PYTHONPATH", "")])}


def run(*arguments, environment, **options):
    return subprocess.run([*COMMAND, *arguments], env=environment, text=True, timeout=300, **options)


def first_import(environment, name, action):
    """Runs `action` when a module is first looked for."""
    script = f"""
        import os, signal, sys
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == {name!r}:
                    {action}
        sys.meta_path.insert(0, Finder())
    """
    folder = environment["PYTHONPATH"].split(os.pathsep)[0]
    Path(folder, "sitecustomize.py").write_text(textwrap.dedent(script))


def test_help_needs_neither_torch_nor_transformers(environment):
    for heavy in ("torch", "transformers", "numpy"):
        first_import(environment, heavy, "os._exit(77)")
        for arguments in (["--help"], ["--version"], ["encode", "--help"], ["verify", "--help"]):
            result = run(*arguments, environment=environment, capture_output=True)
            assert result.returncode == 0, (heavy, arguments, result.stderr)
            assert result.stdout


@pytest.mark.parametrize(
    "module", ["typer", "torch", "transformers", "roberta_kernels.patching", "roberta_kernels.cli.loading"]
)
def test_ctrl_c_during_import(environment, module, tmp_path):
    first_import(environment, module, "os.kill(os.getpid(), signal.SIGINT)")
    # In the background of a shell without job control the signal is ignored, and a child would ignore it too.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    result = run("verify", str(tmp_path), environment=environment, capture_output=True, preexec_fn=heard)
    assert (result.returncode, result.stderr) == (INTERRUPTED, "")


def test_a_full_stdout(environment):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        result = run("--version", environment=environment, stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "No space left" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--version"], ["--help"]])
def test_a_closed_stdout(environment, arguments):
    result = run(*arguments, environment=environment, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert (result.returncode, result.stderr) == (1, "error: standard output is closed\n")


def test_a_reader_that_is_gone(environment):
    reader, writer = os.pipe()
    os.close(reader)
    result = run("--help", environment=environment, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 1


def test_full_stdout_and_stderr(environment):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        for arguments in (["--version"], ["encode", "nothing.txt", "out.npy", "--model", "nowhere"]):
            result = run(*arguments, environment=environment, stdout=full, stderr=full)
            assert result.returncode == 1 if arguments == ["--version"] else result.returncode in (1, 2)


def test_a_closed_stream_leaves_its_number_to_no_file(environment, tmp_path):
    """A library that prints to descriptor 1 must not print into a file of ours."""
    script = (
        "import os, sys\n"
        "os.close(1)\n"
        "sys.stdout = None\n"
        "from roberta_kernels.cli import console\n"
        "console.keep_closed_streams_closed()\n"
        "file = open(sys.argv[1], 'wb')\n"
        "os.write(1, b'noise')\n"
        "file.write(b'rows')\n"
        "file.close()\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "file"], env=environment, check=True)
    assert (tmp_path / "file").read_bytes() == b"rows"
