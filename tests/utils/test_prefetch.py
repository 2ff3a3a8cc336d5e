"""Items are built in a thread ahead of their use."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextvars import ContextVar

import pytest

from vz_ray.utils.prefetch import prefetch

TIMEOUT_S = 30.0


class GatedBuilder:
    """Builds items; counts them, and blocks at those from `closed_from` until `gate` is set."""

    def __init__(self, closed_from: int = 1_000) -> None:
        self.started, self.threads = threading.Semaphore(0), set[str]()
        self.gate, self._closed_from, self.built = threading.Event(), closed_from, list[int]()

    def __call__(self, item: int) -> int:
        self.threads.add(threading.current_thread().name)
        self.started.release()
        if item >= self._closed_from:
            assert self.gate.wait(TIMEOUT_S)
        self.built.append(item)
        return 10 * item

    def wait_for_starts(self, count: int) -> None:
        for _ in range(count):
            assert self.started.acquire(timeout=TIMEOUT_S)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_results_come_in_order(ahead: int) -> None:
    with prefetch(lambda item: item**2, range(5), ahead) as results:
        assert list(results) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("ahead", [1, 2])
def test_builds_while_caller_holds_an_item_up_to_bound(ahead: int) -> None:
    build, initialized = GatedBuilder(), list[str]()
    with prefetch(build, range(9), ahead, initializer=lambda: initialized.append("once")) as results:
        assert next(results) == 0
        build.wait_for_starts(1 + ahead)  # the caller still holds item 0
        assert not build.started.acquire(timeout=0.05)
        assert next(results) == 10
        build.wait_for_starts(1)
    assert initialized == ["once"]
    assert len(build.threads) == 1
    assert threading.current_thread().name not in build.threads


def test_without_ahead_items_are_built_in_the_callers_thread() -> None:
    build = GatedBuilder()
    with prefetch(build, range(3), 0) as results:
        assert not build.built
        assert next(results) == 0
        assert build.built == [0]
    assert build.threads == {threading.current_thread().name}


def test_error_is_raised_where_its_item_is_taken_with_cause() -> None:
    def build(item: int) -> int:
        if item == 1:
            raise ValueError("item 1 is broken") from KeyError("digest")
        return item

    with prefetch(build, range(3), 2) as results:
        assert next(results) == 0
        with pytest.raises(ValueError, match="item 1 is broken") as caught:
            next(results)
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.traceback[-1].name == "build"


def test_leaving_early_cancels_pending_items_and_awaits_the_running_one() -> None:
    build = GatedBuilder(closed_from=1)

    def leave(results: Iterator[int]) -> None:
        assert next(results) == 0
        build.wait_for_starts(2)  # item 1 is running, item 2 is pending
        threading.Timer(0.05, build.gate.set).start()
        raise RuntimeError("the step failed")

    with pytest.raises(RuntimeError, match="the step failed"), prefetch(build, range(9), 2) as results:
        leave(results)
    assert build.built == [0, 1]
    assert not [thread for thread in threading.enumerate() if thread.name in build.threads]


def test_thread_sees_the_callers_context() -> None:
    step: ContextVar[int] = ContextVar("step", default=0)
    token = step.set(7)
    try:
        with prefetch(lambda item: step.get() + item, range(2), 1) as results:
            assert list(results) == [7, 8]
    finally:
        step.reset(token)
