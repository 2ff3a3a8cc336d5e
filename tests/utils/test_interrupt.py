"""Clean stop on signals, and restored signal handlers."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

import pytest

from vz_ray.utils.interrupt import Interrupt, StopRequested, restore_signal_handlers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_requests_a_stop(number):
    with Interrupt() as interrupt:
        interrupt.raise_if_requested()
        os.kill(os.getpid(), number)
        assert interrupt.requested
        with pytest.raises(StopRequested, match=number.name):
            interrupt.raise_if_requested()


def test_handlers_are_restored_on_exit():
    previous = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupt():
        assert signal.getsignal(signal.SIGINT) != previous[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == previous


def test_handlers_replaced_in_python_are_reinstalled():
    with Interrupt() as interrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        interrupt.raise_if_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested


@pytest.mark.parametrize(
    "reinstall", [lambda interrupt: interrupt.raise_if_requested(), lambda _: restore_signal_handlers()]
)
def test_handlers_replaced_in_c_are_reinstalled(reinstall):
    with Interrupt() as interrupt:
        previous = signal.getsignal(signal.SIGTERM)
        ctypes.CDLL(None).signal(int(signal.SIGTERM), ctypes.c_void_p(int(signal.SIG_IGN)))
        assert signal.getsignal(signal.SIGTERM) == previous
        reinstall(interrupt)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_kills_the_process(number):
    code = (
        "import os, signal\n"
        "from vz_ray.utils.interrupt import Interrupt\n"
        "with Interrupt() as interrupt:\n"
        f"    os.kill(os.getpid(), {number}); print('first', flush=True)\n"
        f"    os.kill(os.getpid(), {number}); print('second', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.returncode) == ("first\n", -number)


async def test_earlier_stop_request_interrupts_instant_work() -> None:
    async def work() -> int:
        return 1

    with Interrupt() as interrupt:
        assert await interrupt.run_interruptible(work()) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopRequested):
            await interrupt.run_interruptible(work())
