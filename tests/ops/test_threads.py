"""A backend that is asked for in one place does not reach into another: threads, tasks, generators, forks, traces."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from roberta_kernels import backends, ops
from roberta_kernels.backends import BackendError, backend, current_backend, override, set_backend

from .cases import FLOAT32, Draw, assert_repeats
from .samples import OPS, Sample, sample

COMPILED = bool(backends.available_backends()["cpu"])
# Backends that run on CPU tensors at the speed of a test.
HERE = ("cpu", "reference") if COMPILED else ("auto", "reference")
ROUNDS = 40


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    assert current_backend() == "auto"
    yield
    left, default = current_backend(), set_backend("auto")
    assert (left, default) == ("auto", "auto")
    assert in_a_thread(current_backend) == "auto"


def in_a_thread(function: Callable[[], Any]) -> Any:
    """What it returns, or raises, in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=120)


class Namespaces(TorchDispatchMode):
    """The backends of the ops that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace = str(func).partition(".")[0]
        if namespace.startswith("roberta_kernels_"):
            self.seen.add(namespace.removeprefix("roberta_kernels_"))
        return func(*args, **(kwargs or {}))


def serving_backends(call: Sample) -> set[str]:
    with Namespaces() as ran:
        call()
    return ran.seen


# ----------------------------------------------------------------------------------------------------------- threads


@pytest.mark.skipif(not COMPILED, reason="needs two backends")
@pytest.mark.parametrize("op", OPS)
def test_threads_with_different_backends(op: str) -> None:
    """Each gets the backend that it asked for, and that one's answers, in every call; and backward is forward's."""
    call = sample(op, Draw(7, "cpu"), FLOAT32)
    name, tensor = next(iter(call.tensors.items()))
    expected: dict[str, Any] = {}

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        leaf = tensor.clone().requires_grad_()
        out = call(**{name: leaf})
        return out.detach(), torch.autograd.grad(out.sum(), leaf)[0]

    for asked in HERE:
        with backend(asked):
            expected[asked] = run()
    barrier = threading.Barrier(4)

    def work(asked: str) -> None:
        barrier.wait(60)
        for _ in range(ROUNDS):
            with backend(asked):
                assert serving_backends(call) == {asked}
                got = run()
                for again, first in zip(got, expected[asked], strict=True):
                    assert_repeats(again, first, asked)
                assert current_backend() == asked
            assert current_backend() == "auto"

    with ThreadPoolExecutor(4) as pool:
        for one in [pool.submit(work, asked) for asked in (*HERE, *HERE)]:
            one.result(timeout=120)


def test_a_block_is_not_seen_by_other_threads() -> None:
    with backend("reference"):
        assert in_a_thread(current_backend) == "auto"
        with ThreadPoolExecutor(2) as pool:
            assert set(pool.map(lambda _: current_backend(), range(8))) == {"auto"}
            # Who wants it there says so.
            context = contextvars.copy_context()
            assert pool.submit(context.run, current_backend).result() == "reference"


def test_a_block_in_a_pool_does_not_stay_with_its_worker() -> None:
    def work(asked: str) -> str:
        with backend(asked):
            if asked == "reference":
                raise KeyError(asked)
            return current_backend()

    with ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            with pytest.raises(KeyError):
                pool.submit(work, "reference").result()
            assert pool.submit(current_backend).result() == "auto"
            assert pool.submit(work, HERE[0]).result() == HERE[0]


def test_set_backend_is_seen_by_all_threads() -> None:
    seen: list[str] = []
    told, done = threading.Event(), threading.Event()

    def look() -> None:
        seen.append(current_backend())
        told.set()
        done.wait(60)
        seen.append(current_backend())
        with backend("auto"):
            seen.append(current_backend())

    thread = threading.Thread(target=look)
    thread.start()
    assert told.wait(60)
    set_backend("reference")
    done.set()
    thread.join(60)
    assert seen == ["auto", "reference", "auto"]
    assert current_backend() == "reference"
    assert in_a_thread(current_backend) == set_backend("auto") == "reference"


def test_set_backend_in_a_block_holds_outside_of_it() -> None:
    with backend("reference"):
        assert set_backend(HERE[0]) == "auto"
        assert current_backend() == "reference"
        assert in_a_thread(current_backend) == HERE[0]
    assert current_backend() == HERE[0]
    assert set_backend("auto") == HERE[0]


# --------------------------------------------------------------------------- blocks: nested, raising, out of order


def test_nested_blocks_and_exceptions() -> None:
    def fail() -> None:
        with backend(HERE[0]):
            raise KeyError(current_backend())

    with backend("reference"):
        with pytest.raises(KeyError, match=HERE[0]):
            fail()
        assert current_backend() == "reference"
        with pytest.raises(BackendError, match="unknown"), backend("nothing"):
            pass
        assert current_backend() == "reference"
        with backend("auto"):
            assert current_backend() == "auto"
        assert current_backend() == "reference"


def test_a_block_is_entered_once() -> None:
    block = backend("reference")
    with block, pytest.raises(RuntimeError, match="entered"):
        block.__enter__()
    with block:
        assert current_backend() == "reference"


def test_generators_end_their_blocks_in_any_order() -> None:
    def asks(name: str) -> Iterator[str]:
        with backend(name):
            yield current_backend()

    for order in ((0, 1), (1, 0)):
        made = [asks("reference"), asks(HERE[0])]
        assert [next(one) for one in made] == ["reference", HERE[0]]
        made[order[0]].close()
        assert current_backend() == ("reference", HERE[0])[order[1]]
        made[order[1]].close()
        assert current_backend() == "auto"


def test_a_block_that_ends_in_another_thread_has_ended() -> None:
    def asks() -> Iterator[None]:
        with backend("reference"):
            yield

    one = asks()
    next(one)
    assert current_backend() == "reference"
    in_a_thread(one.close)
    assert current_backend() == "auto"


def test_many_blocks_leave_nothing_in_memory() -> None:
    for _ in range(1000):
        with backend("reference"):
            pass
    assert override._innermost.get() is None


# ----------------------------------------------------------------------------------------------------- asyncio, fork


def test_asyncio_tasks_do_not_meet() -> None:
    async def work(asked: str) -> None:
        for _ in range(20):
            with backend(asked):
                await asyncio.sleep(0)
                assert current_backend() == asked
            await asyncio.sleep(0)
            assert current_backend() == "auto"

    async def all_of_them() -> None:
        await asyncio.gather(*(work(asked) for asked in (*HERE, *HERE)))

    asyncio.run(all_of_them())


def test_a_task_takes_part_in_its_makers_block_until_that_ends() -> None:
    async def ask(started: asyncio.Event, go: asyncio.Event) -> list[str]:
        seen = [current_backend()]
        started.set()
        await go.wait()
        return [*seen, current_backend()]

    async def main() -> list[str]:
        started, go = asyncio.Event(), asyncio.Event()
        with backend("reference"):
            task = asyncio.create_task(ask(started, go))
            await started.wait()
        go.set()
        return await task

    assert asyncio.run(main()) == ["reference", "auto"]


def test_to_thread_takes_the_block_along() -> None:
    async def main() -> str:
        with backend("reference"):
            return await asyncio.to_thread(current_backend)

    assert asyncio.run(main()) == "reference"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_after_use() -> None:
    """The child is in the block that the parent was in; what it does there, the parent does not notice."""
    x = torch.ones(1, 32)

    def norm() -> torch.Tensor:
        return ops.add_layer_norm(x, x, x[0], x[0], eps=1e-5)

    expected = norm()
    with backend("reference"):
        norm()
        child = os.fork()
        if child == 0:
            try:
                right = current_backend() == "reference" and bool(torch.allclose(norm(), expected))
                with backend("auto"):
                    right = right and current_backend() == "auto" and bool(torch.allclose(norm(), expected))
                set_backend("reference")
                os._exit(0 if right else 1)
            finally:
                os._exit(2)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert current_backend() == "reference"
    assert current_backend() == "auto"


# ------------------------------------------------------------------------------------------------------------ tracing


def targets(function: Callable[..., Any], *args: Any) -> list[str]:
    """The backends of the ops in the graphs that this call compiles."""
    seen: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        names = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        seen.extend(n.partition(".")[0].removeprefix("roberta_kernels_") for n in names if "roberta_kernels_" in n)
        return graph.forward

    torch.compile(function, backend=record, fullgraph=True)(*args)
    return seen


def _norm(x: torch.Tensor) -> torch.Tensor:
    return ops.add_layer_norm(x, x, x[0], x[0], eps=1e-5)


def test_a_traced_graph_is_the_context_s_own() -> None:
    """A compiled function asks again in each context: threads do not run each other's graphs."""
    torch._dynamo.reset()
    x = torch.randn(3, 32)
    auto = str(backends.serving(x))
    assert targets(_norm, x) == [auto]
    with backend("reference"):
        assert targets(_norm, x) == ["reference"]
        assert in_a_thread(lambda: targets(_norm, x)) == [auto]
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(_norm, backend=counter, fullgraph=True)
    for asked in ("auto", "reference", "auto", "reference"):
        with backend(asked):
            compiled(x)
            in_a_thread(lambda: compiled(x))
    assert counter.frame_count == 2, "a graph for each backend, and no more"


def test_a_block_inside_of_traced_code() -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 32)
    auto = str(backends.serving(x))

    def function(x: torch.Tensor) -> torch.Tensor:
        with backend("reference"):
            x = _norm(x)
            with backend("auto"):
                x = _norm(x)
            x = _norm(x)
        return _norm(x)

    assert targets(function, x) == ["reference", auto, "reference", auto]
    with backend("reference"):
        assert targets(function, x) == ["reference", auto, "reference", "reference"]
    assert override._traced.name is None


def test_a_block_around_a_graph_break() -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 32)

    def function(x: torch.Tensor, fail: bool) -> torch.Tensor:
        with backend("reference"):
            x = _norm(x)
            torch._dynamo.graph_break()
            x = _norm(x)
            if fail:
                raise KeyError
        return x

    compiled = torch.compile(function, backend="eager")
    for _ in range(2):
        with Namespaces() as ran:
            compiled(x, False)
        assert ran.seen == {"reference"}
        with pytest.raises(KeyError):
            compiled(x, True)
        assert (current_backend(), override._traced.name) == ("auto", None)


def test_a_block_inside_of_exported_code() -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with backend("reference"):
                x = _norm(x)
            return _norm(x)

    x = torch.randn(3, 32)
    for strict in (False, True):
        exported = torch.export.export(Norm(), (x,), strict=strict)
        names = [str(node.target) for node in exported.graph.nodes if "roberta_kernels_" in str(node.target)]
        found = [name.partition(".")[0].removeprefix("roberta_kernels_") for name in names]
        assert found == ["reference", str(backends.serving(x))]
        assert override._traced.name is None
