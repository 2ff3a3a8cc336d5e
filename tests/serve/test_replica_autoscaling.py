"""Autoscaling from one to two replicas under load, without losing a request."""

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
SCALE_UP_TIMEOUT_S = 600.0


def test_queued_requests_add_a_replica(tmp_path: Path) -> None:
    more = {
        "min_replicas": 1,
        "max_replicas": 2,
        "max_ongoing_requests": 4,
        "target_ongoing_requests": 2,
        "max_queued_requests": 64,
    }
    with live_server(tiny_serve_config(tmp_path, **more), tmp_path) as server:
        client, stop = server.client(), threading.Event()
        outcomes: Counter[object] = Counter()

        def agents() -> int:
            return int(httpx.get(f"{server.url}/ready", timeout=30).json()["agents"])

        def load(_: int) -> None:
            while not stop.is_set():
                try:
                    outcomes[server.ask(LONG, client=client).choices[0].message.content] += 1
                except openai.APIStatusError as error:
                    outcomes[error.status_code] += 1

        assert agents() == 1
        with ThreadPoolExecutor(8) as threads:
            clients = [threads.submit(load, number) for number in range(8)]
            try:
                end_time = time.monotonic() + SCALE_UP_TIMEOUT_S
                while agents() < 2:
                    assert time.monotonic() < end_time, f"no second replica started; outcomes: {outcomes}"
                    time.sleep(1)
                before = outcomes.total()
                while outcomes.total() < before + 16:
                    time.sleep(0.2)
            finally:
                stop.set()
            for thread in clients:
                thread.result()
        assert set(outcomes) == {"B"}
