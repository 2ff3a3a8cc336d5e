"""A server that may have two agents and has one: requests that wait bring the second, and none is lost."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests.serve.live_server import live_server, tiny_serve_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

LONG = "{think 12} {zoom 2 4 2} {think 12} {zoom 6 8 2} {think 12} {answer B}"
COMES_S = 600.0


def test_requests_that_wait_bring_another_agent(tmp_path: Path) -> None:
    more = {
        "min_replicas": 1,
        "max_replicas": 2,
        "requests_per_replica": 4,
        "target_requests": 2,
        "queue": 64,
    }
    with live_server(tiny_serve_config(tmp_path, **more), tmp_path) as server:
        client, over = server.client(), threading.Event()
        found: Counter[object] = Counter()

        def agents() -> int:
            return int(httpx.get(f"{server.url}/ready", timeout=30).json()["agents"])

        def load(_: int) -> None:
            while not over.is_set():
                try:
                    found[server.ask(LONG, client=client).choices[0].message.content] += 1
                except openai.APIStatusError as error:
                    found[error.status_code] += 1

        assert agents() == 1
        with ThreadPoolExecutor(8) as threads:
            waiting = [threads.submit(load, number) for number in range(8)]
            try:
                until = time.monotonic() + COMES_S
                while agents() < 2:
                    assert time.monotonic() < until, f"no second agent came; requests ended as {found}"
                    time.sleep(1)
                before = found.total()
                while found.total() < before + 16:
                    time.sleep(0.2)
            finally:
                over.set()
            for one in waiting:
                one.result()
        assert set(found) == {"B"}
