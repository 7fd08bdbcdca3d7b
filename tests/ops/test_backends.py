"""Which backend runs: by default, by override, by environment variable; and what happens when it cannot."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import forks
import pytest
import torch

import roberta_kernels
from roberta_kernels import backends, ops
from roberta_kernels.backends import BackendError, selection

from .cases import BFLOAT16, DEVICE, FLOAT16, FLOAT32, FLOAT64, HAS_CUDA, Draw
from .samples import OPS, sample

NAMES = ("cuda", "triton", "cpu", "reference")
AVAILABLE = [name for name, status in backends.available_backends().items() if status]
MISSING = [name for name in NAMES if name not in AVAILABLE]
needs_cpu_kernels = pytest.mark.skipif("cpu" not in AVAILABLE, reason="the compiled cpu kernels are not there")


def served_by(dtype: torch.dtype, device: str = "cpu") -> str:
    return str(backends.serving(torch.empty(0, dtype=dtype, device=device)))


def run_python(
    code: str, *command: str, root: Path | None = None, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own. command: its arguments; root: where the package is; environment: variables to
    set (None: to unset).
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith(("ROBERTA_KERNELS", "TRITON"))}
    for key, value in environment.items():
        env.pop(key, None)
        if value is not None:
            env[key] = value
    env["PYTHONPATH"] = str(root or Path(roberta_kernels.__file__).parents[1])
    return forks.python("-c", code, *command, environment=env, cwd=root or Path("/"))


def test_available_backends_says_what_and_why() -> None:
    status = backends.available_backends()
    assert tuple(status) == NAMES
    assert status["reference"].available
    for name, one in status.items():
        assert bool(one) == one.available
        assert len(one.detail) > 5, name
    if status["cpu"]:
        assert backends.cpu_isa() in status["cpu"].detail
        assert all(isa in status["cpu"].detail for isa in backends.cpu_isas())
    if not torch.cuda.is_available() and status["triton"]:
        assert "interpreted" in status["triton"].detail


def test_override_nests_and_ends() -> None:
    assert backends.current_backend() == "auto"
    with backends.backend("reference"):
        assert backends.current_backend() == "reference"
        assert served_by(FLOAT32) == "reference"
        with backends.backend("auto"):
            assert backends.current_backend() == "auto"
        assert backends.current_backend() == "reference"
    assert backends.current_backend() == "auto"

    def fail() -> None:
        with backends.backend("reference"):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert backends.current_backend() == "auto"
    assert backends.set_backend("reference") == "auto"
    assert backends.set_backend("auto") == "reference"


def test_unknown_backend() -> None:
    for name in ("gpu", "", "CPU", "Reference"):
        with pytest.raises(BackendError, match=r"unknown backend.*auto, cuda, triton, cpu, reference"):
            backends.set_backend(name)
        with pytest.raises(BackendError, match="unknown"), backends.backend(name):
            pass
    assert backends.current_backend() == "auto"


@pytest.mark.parametrize("name", MISSING)
def test_unavailable_backend(name: str) -> None:
    with pytest.raises(BackendError, match=f"'{name}' is not available") as caught:
        backends.set_backend(name)
    assert backends.available_backends()[name].detail in str(caught.value)
    assert backends.current_backend() == "auto"


def test_auto_on_the_cpu() -> None:
    """float32 and bfloat16 go to the compiled kernels where there are any; float16 and float64 never do."""
    compiled = "cpu" if "cpu" in AVAILABLE else "reference"
    assert served_by(FLOAT32) == served_by(BFLOAT16) == compiled
    assert served_by(FLOAT16) == served_by(FLOAT64) == "reference"


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_auto_on_a_gpu() -> None:
    """With nothing measured."""
    best = next(name for name in ("triton", "cuda", "reference") if name in AVAILABLE)
    try:
        with pytest.MonkeyPatch.context() as patching:
            patching.setattr(selection, "_table", ())
            selection._follow_gpus()
            assert served_by(FLOAT32, "cuda") == served_by(BFLOAT16, "cuda") == served_by(FLOAT16, "cuda") == best
    finally:
        selection._follow_gpus()
    assert served_by(FLOAT64, "cuda") == "reference"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT64])
def test_dtypes_without_cpu_kernels_run_all_the_same(op: str, dtype: torch.dtype) -> None:
    call = sample(op, Draw(5, "cpu"), dtype)
    out = call()
    in_float32 = op in ("linear_cross_entropy", "linear_log1p_max") and dtype == FLOAT16
    assert out.dtype == (FLOAT32 if in_float32 else dtype)
    with backends.backend("reference"):
        assert torch.equal(out, call())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("name", "dtype"), [("cpu", FLOAT16), ("cpu", FLOAT64), ("triton", FLOAT64), ("cuda", FLOAT64)], ids=str
)
def test_a_forced_backend_that_cannot_run_raises(op: str, name: str, dtype: torch.dtype) -> None:
    """It never falls back: who forces a backend wants that one."""
    if name not in AVAILABLE:
        pytest.skip(f"backend {name!r} is not available: {backends.available_backends()[name].detail}")
    call = sample(op, Draw(5, DEVICE if name == "cuda" else "cpu"), dtype)
    with backends.backend(name), pytest.raises(BackendError, match=f"'{name}' does not support {dtype}"):
        call()


@pytest.mark.gpu
@needs_cpu_kernels
@pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device")
def test_a_forced_backend_of_another_device_raises() -> None:
    with backends.backend("cpu"), pytest.raises(BackendError, match=r"does not run.*on cuda"):
        sample("add_layer_norm", Draw(5, "cuda"), FLOAT32)()


def test_meta_tensors_have_shapes() -> None:
    """A model on the meta device can be traced."""
    for op in OPS:
        call = sample(op, Draw(5, DEVICE), FLOAT32)
        expected = call()
        call.tensors = {name: t.to("meta") for name, t in call.tensors.items()}
        call.rest = {key: t.to("meta") if isinstance(t, torch.Tensor) else t for key, t in call.rest.items()}
        out = call()
        assert out.device.type == "meta"
        assert out.shape == expected.shape


def test_gradients_come_from_the_backend_that_ran_forward() -> None:
    """Not from the one that is set when backward runs."""
    call = sample("add_layer_norm", Draw(5, DEVICE), FLOAT32)
    x = call.tensors["x"].clone().requires_grad_()
    with backends.backend("reference"):
        out = call(x=x)
        (expected,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
    seen: list[str] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Record():
        (got,) = torch.autograd.grad(out.square().sum(), x)
    assert torch.equal(got, expected)
    assert "roberta_kernels_reference.add_layer_norm_backward.default" in seen


def test_kernels_name_what_is_missing() -> None:
    kernels = backends.namespaces()["reference"]
    assert repr(kernels) == "Kernels('reference')"
    with pytest.raises(AttributeError, match="'reference' has no op 'conv2d'"):
        _ = kernels.conv2d
    with pytest.raises(AttributeError, match="no op"):
        kernels.conv2d_forward()


# ------------------------------------------------------------------------------------------------- instruction sets


@needs_cpu_kernels
def test_instruction_sets() -> None:
    isas = backends.cpu_isas()
    assert isas[0] == "portable"
    assert list(isas) == [isa for isa in backends.CPU_ISAS if isa in isas], "plainest first"
    assert backends.cpu_isa() == os.environ.get("ROBERTA_KERNELS_CPU_ISA", isas[-1])
    before = backends.cpu_isa()
    for isa in isas:
        with backends.use_cpu_isa(isa):
            assert backends.cpu_isa() == isa
        assert backends.cpu_isa() == before
    with pytest.raises(BackendError, match=r"'sse' is not available.*portable"), backends.use_cpu_isa("sse"):
        pass


@needs_cpu_kernels
def test_instruction_sets_differ_in_speed_not_in_masks() -> None:
    """Each ISA is a library of its own: the same numbers up to rounding, the same dropout."""
    call = sample("embedding_layer_norm", Draw(5, "cpu"), FLOAT32, every_option=True)
    outputs = []
    for isa in backends.cpu_isas():
        with backends.use_cpu_isa(isa), backends.backend("cpu"):
            outputs.append(call())
    for other in outputs[1:]:
        assert torch.equal(other == 0, outputs[0] == 0)
        torch.testing.assert_close(other, outputs[0], rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------- environment, import, absence

ASK = """
import torch
from roberta_kernels import backends
print(backends.current_backend(), str(backends.serving(torch.empty(0))))
"""


FIRST_USE = """
import torch
import roberta_kernels as rk
from roberta_kernels import backends

rk.available_backends()
x = torch.randn(3, 32)
def op():
    rk.ops.add_layer_norm(x, x, x[0], x[0], eps=1e-5)
uses = [op, op, lambda: backends.serving(x), backends.check_environment]
for use in uses:
    try:
        use()
    except rk.BackendError as error:
        print(error)
with rk.backend("reference"):
    op()
rk.set_backend("reference")
op()
"""


def test_environment_variable() -> None:
    result = run_python(ASK, ROBERTA_KERNELS_BACKEND="reference")
    assert result.stdout.split() == ["reference", "reference"], result.stderr


@pytest.mark.parametrize(
    ("value", "says"), [("gpu", "unknown backend 'gpu'"), *((n, "not available") for n in MISSING[:1])]
)
def test_environment_variable_with_a_bad_value(value: str, says: str) -> None:
    """An error of one line at the first use: not at import, and not another backend in silence."""
    result = run_python(FIRST_USE, ROBERTA_KERNELS_BACKEND=value)
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    assert len(said) == 4
    assert all(f"ROBERTA_KERNELS_BACKEND={value}: " in line and says in line for line in said), said


@needs_cpu_kernels
def test_instruction_set_by_environment_variable() -> None:
    code = "from roberta_kernels import backends as b; print(b.cpu_isa(), *b.cpu_isas())"
    result = run_python(code, ROBERTA_KERNELS_CPU_ISA="portable")
    assert result.stdout.split() == ["portable", *backends.cpu_isas()], result.stderr


@needs_cpu_kernels
def test_instruction_set_by_environment_variable_with_a_bad_value() -> None:
    result = run_python(FIRST_USE, ROBERTA_KERNELS_CPU_ISA="sse2")
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    assert len(said) == 4
    expected = f"ROBERTA_KERNELS_CPU_ISA must be one of {', '.join(backends.cpu_isas())}"
    assert all(expected in line and line.endswith("got 'sse2'") for line in said), said


BAD_VARIABLES = ["ROBERTA_KERNELS_BACKEND", pytest.param("ROBERTA_KERNELS_CPU_ISA", marks=needs_cpu_kernels)]


@pytest.mark.parametrize("variable", BAD_VARIABLES)
def test_a_command_ends_in_one_line_where_the_environment_is_wrong(variable: str) -> None:
    """Before it does anything, whichever command it is."""
    result = run_python("from roberta_kernels.cli import main; main()", "env", **{variable: "foo"})
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert variable in result.stderr
    possible = ("auto", "reference") if variable == "ROBERTA_KERNELS_BACKEND" else backends.cpu_isas()
    assert all(name in result.stderr for name in possible)


def copy_of_the_package(tmp_path: Path) -> Path:
    shutil.copytree(
        Path(roberta_kernels.__file__).parent,
        tmp_path / "roberta_kernels",
        ignore=shutil.ignore_patterns("*.so", "build_report.json", "__pycache__"),
    )
    return tmp_path


WITHOUT_COMPILED = """
import torch
import roberta_kernels as rk
from roberta_kernels import backends, ops
status = rk.available_backends()["cpu"]
assert not status and "not compiled" in status.detail and "pip install" in status.detail, status
assert backends.cpu_isas() == ()
x = torch.randn(3, 32, requires_grad=True)
out = ops.add_layer_norm(x, x, torch.ones(32), torch.zeros(32), eps=1e-5)
out.square().sum().backward()
assert x.grad is not None and str(backends.serving(x)) == "reference"
try:
    rk.set_backend("cpu")
except rk.BackendError as error:
    assert "not compiled" in str(error)
else:
    raise AssertionError("set_backend('cpu') did not raise")
try:
    backends.use_cpu_isa("avx2").__enter__()
except rk.BackendError as error:
    assert "no compiled kernels" in str(error)
else:
    raise AssertionError("use_cpu_isa did not raise")
print(rk.__file__)
"""


def test_without_the_compiled_library(tmp_path: Path) -> None:
    """The package imports, says why, and the reference runs."""
    result = run_python(WITHOUT_COMPILED, root=copy_of_the_package(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().startswith(str(tmp_path)), "it was the copy that ran"


BROKEN = """
import torch
from roberta_kernels import backends
status = backends.available_backends()["cpu"]
assert not status and "_cpu.so" in status.detail and torch.__version__ in status.detail, status
assert str(backends.serving(torch.empty(0))) == "reference"
print("served")
"""


def test_with_a_library_that_does_not_load(tmp_path: Path) -> None:
    """Built for another torch, or broken: one line says so, and the reference runs."""
    root = copy_of_the_package(tmp_path)
    (root / "roberta_kernels" / "_cpu.so").write_bytes(b"no library")
    result = run_python(BROKEN, root=root)
    assert result.stdout.strip() == "served", result.stderr


def test_public_names() -> None:
    assert set(ops.__all__) == {*OPS, "draw_seeds"}
    for name in ("BackendError", "available_backends", "backend", "set_backend", "ops"):
        assert hasattr(roberta_kernels, name)
