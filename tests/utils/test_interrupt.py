from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

import pytest

from vz_ray.utils.interrupt import Interrupt, StopRequested, restore_signal_handlers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_seen_between_steps_and_not_before(number):
    with Interrupt() as interrupt:
        interrupt.raise_if_requested()
        os.kill(os.getpid(), number)
        assert interrupt.requested
        with pytest.raises(StopRequested, match=number.name):
            interrupt.raise_if_requested()


def test_the_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupt():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_handlers_that_a_library_replaced_are_taken_back():
    with Interrupt() as interrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        interrupt.raise_if_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested


@pytest.mark.parametrize(
    "take_back", [lambda interrupt: interrupt.check(), lambda _: restore_signal_handlers()]
)
def test_handlers_that_were_replaced_below_python_are_taken_back(take_back):
    with Interrupt() as interrupt:
        before = signal.getsignal(signal.SIGTERM)
        ctypes.CDLL(None).signal(int(signal.SIGTERM), ctypes.c_void_p(int(signal.SIG_IGN)))
        assert signal.getsignal(signal.SIGTERM) == before
        take_back(interrupt)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_kills(number):
    code = (
        "import os, signal\n"
        "from vz_ray.utils.interrupt import Interrupt\n"
        "with Interrupt() as interrupt:\n"
        f"    os.kill(os.getpid(), {number}); print('first', flush=True)\n"
        f"    os.kill(os.getpid(), {number}); print('second', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("first\n", -number)


async def test_a_stop_asked_for_before_is_noticed_by_work_that_ends_at_once() -> None:
    async def work() -> int:
        return 1

    with Interrupt() as interrupt:
        assert await interrupt.run_interruptible(work()) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopRequested):
            await interrupt.run_interruptible(work())
