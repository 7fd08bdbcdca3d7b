"""What is too old is refused when the package is imported, in one line that says what to do about it."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

from roberta_kernels import requirements


@pytest.fixture
def versions(monkeypatch):
    """Other versions than those that are installed, by package."""
    installed, found = metadata.version, {}

    def version(package):
        answer = found.get(package) or installed(package)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(metadata, "version", version)
    return found


def refusal():
    with pytest.raises(ImportError) as caught:
        requirements.check()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("roberta_kernels requires ")
    return message


def test_what_is_installed_is_supported():
    requirements.check()


@pytest.mark.parametrize(
    ("package", "old"),
    [
        ("torch", "2.9.1"),
        ("torch", "2.9.1+cu128"),
        ("torch", "1.13"),
        ("transformers", "5.5.4"),
        ("transformers", "4.57.0"),
        ("transformers", "5.5.0.dev0"),
    ],
)
def test_too_old(versions, package, old):
    versions[package] = old
    message = refusal()
    assert f"{package} >= {requirements.FLOORS[package]}" in message
    assert old in message


@pytest.mark.parametrize(
    ("package", "new"),
    [
        ("torch", "2.10.0"),
        ("torch", "2.10.0+cpu"),
        ("torch", "2.10.0a0+git1234"),
        ("torch", "3.0"),
        ("torch", "2.100"),
        ("transformers", "5.6.0"),
        ("transformers", "5.6.0rc1"),
        ("transformers", "5.10.0"),
        ("transformers", "6.0.0.dev0"),
    ],
)
def test_new_enough(versions, package, new):
    versions[package] = new
    requirements.check()


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_not_installed(versions, package):
    versions[package] = metadata.PackageNotFoundError(package)
    message = refusal()
    assert package in message
    assert "not installed" in message


def test_python_too_old(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    message = refusal()
    assert "Python >= 3.10" in message
    assert "3.9.18" in message


def test_floors_are_those_of_the_package():
    # One floor, in two files.
    try:
        declared = metadata.requires("roberta_kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("not installed, only importable")
    for package, floor in requirements.FLOORS.items():
        assert f"{package}>={floor}" in declared


def test_it_is_the_import_that_refuses():
    script = (
        "import importlib.metadata as m\n"
        "version = m.version\n"
        "m.version = lambda name: '4.1' if name == 'transformers' else version(name)\n"
        "try:\n"
        "    import roberta_kernels\n"
        "except ImportError as error:\n"
        "    assert 'transformers >= ' in str(error) and '4.1' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('imported')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
