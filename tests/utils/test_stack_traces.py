"""Where a process is: threads and tasks by name, with the line that each is at."""

from __future__ import annotations

import asyncio
import threading

from vz_ray.utils.stack_traces import format_stacks


def test_threads_are_named_with_the_function_that_they_are_in() -> None:
    hold = threading.Event()

    def wait_for_a_decoder() -> None:
        hold.wait(30)

    thread = threading.Thread(target=wait_for_a_decoder, name="decode")
    thread.start()
    try:
        found = format_stacks()
    finally:
        hold.set()
        thread.join()
    assert "thread decode:" in found
    assert "wait_for_a_decoder" in found
    assert "task" not in found


async def test_inside_a_loop_tasks_are_there_too() -> None:
    async def wait_for_an_engine() -> None:
        await asyncio.sleep(30)

    task = asyncio.create_task(wait_for_an_engine(), name="episode 7")
    await asyncio.sleep(0)
    found = format_stacks()
    task.cancel()
    assert "task episode 7:" in found
    assert "wait_for_an_engine" in found
