"""A server with two replicas: replica death, weight changes, overload."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.directive_agent import DirectiveAgent
from tests.serve.live_server import LiveServer, live_server, tiny_serve_config
from vz_ray.serve.api_keys import add_key, generate_key
from vz_ray.serve.launch import deploy, read_server_state

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ASK = "{think 6} {zoom 2 4 2} {answer B}"
BACK_S = 300.0


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, openai.OpenAI]]:
    """Server with an API key and two replicas, with capacity for eight requests."""
    folder = tmp_path_factory.mktemp("life")
    secret, key = generate_key("tests")
    add_key(folder / "keys.json", key)
    more: dict[str, Any] = {
        "access.keys_file": folder / "keys.json",
        "min_replicas": 2,
        "max_replicas": 2,
        "max_ongoing_requests": 2,
        "max_queued_requests": 4,
        "timeouts.drain_s": 30,
    }
    with live_server(tiny_serve_config(folder, **more), folder) as running:
        yield running, running.client(secret)


def outcomes(server: LiveServer, client: openai.OpenAI, count: int, question: str = ASK) -> Counter[object]:
    """Send concurrent requests; count answers and error statuses."""

    def ask(_: int) -> object:
        try:
            return server.ask(question, client=client).choices[0].message.content
        except openai.APIStatusError as error:
            is_openai_error = isinstance(error.body, dict) and {"message", "type", "code"} <= set(error.body)
            return error.status_code if is_openai_error else f"{error.status_code} without an OpenAI error body"

    with ThreadPoolExecutor(count) as threads:
        return Counter(threads.map(ask, range(count)))


def replicas() -> list[psutil.Process]:
    """Return the processes of the agent replicas."""
    below = psutil.Process().children(recursive=True)
    return [p for p in below if p.name().startswith("ray::ServeReplica") and "Agent" in p.name()]


def test_wrong_keys_are_rejected(guarded):
    server, _ = guarded
    for key in ("none", "vz-" + "A" * 43):
        with pytest.raises(openai.AuthenticationError):
            server.ask(ASK, client=server.client(key))
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/metrics").status_code == 401


def test_overload_rejects_excess_requests_only(guarded):
    server, client = guarded
    server.ask(ASK, client=client)
    client.models.list()
    long = "{think 12} {zoom 2 4 2} {think 12} {zoom 6 8 2} {answer B}"
    with ThreadPoolExecutor(1) as thread:
        flood = thread.submit(outcomes, server, client, 48, long)
        health_checks = []
        while not flood.done():
            health_checks.append(
                (httpx.get(f"{server.url}/ready", timeout=30).status_code, len(client.models.list().data))
            )
    counts = flood.result()
    # Health checks succeed at full load.
    assert set(health_checks) == {(200, 2)}
    assert set(counts) <= {"B", 503, 429}, counts
    assert counts["B"] >= 4
    assert counts[503] > 0
    with pytest.raises(openai.APIStatusError) as refused:
        refuse_one(server, client)
    assert float(refused.value.response.headers["retry-after"]) >= 1


def refuse_one(server: LiveServer, client: openai.OpenAI) -> None:
    """Raise the error of a request to a full queue."""
    errors: list[openai.APIStatusError] = []

    def ask(_: int) -> None:
        try:
            server.ask("{think 12} {zoom 2 4 2} {answer B}", client=client)
        except openai.APIStatusError as error:
            errors.append(error)

    with ThreadPoolExecutor(32) as threads:
        list(threads.map(ask, range(32)))
    raise errors[0]


def test_replica_death_loses_no_request(guarded):
    server, client = guarded
    batches: list[Counter[object]] = []
    load = threading.Thread(target=lambda: batches.extend(outcomes(server, client, 4) for _ in range(6)))
    load.start()
    time.sleep(0.5)
    victim = replicas()[0]
    victim.send_signal(signal.SIGKILL)
    load.join(BACK_S)
    total = sum(batches, Counter())
    assert set(total) <= {"B", 503}, total
    assert total["B"] >= 20
    deadline = time.monotonic() + BACK_S
    while len(replicas()) < 2 and time.monotonic() < deadline:
        time.sleep(1)
    assert len(replicas()) == 2
    assert outcomes(server, client, 2) == Counter({"B": 2})


def changed(folder: Path) -> Path:
    """Write a copy of the model with other weights."""
    shutil.copytree("assets/tiny-base", folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {n: t * 1.01 if t.dtype == torch.float32 else t for n, t in tensors.items()},
        folder / "model.safetensors",
    )
    return folder


def roll(server: LiveServer, model: Path | str, version: int) -> None:
    from dataclasses import replace

    deploy(replace(server.config, model=str(model)), version, DirectiveAgent)


def test_weights_change_under_load(guarded, tmp_path):
    server, client = guarded
    other = changed(tmp_path / "other")
    pids = sorted(p.pid for p in replicas())
    batches: list[Counter[object]] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            batches.append(outcomes(server, client, 3))

    thread = threading.Thread(target=load)
    thread.start()
    try:
        roll(server, other, 2)
        assert {server.ask(ASK, client=client).model for _ in range(4)} == {"zoomer@2"}
        with pytest.raises(openai.NotFoundError):
            server.ask(ASK, client=client, model="zoomer@1")
        roll(server, "assets/tiny-base", 3)
        assert {server.ask(ASK, client=client).model for _ in range(4)} == {"zoomer@3"}
    finally:
        stop.set()
        thread.join(BACK_S)
    assert set(sum(batches, Counter())) == {"B"}
    assert sorted(p.pid for p in replicas()) == pids


def test_weights_of_another_shape_are_refused(guarded, tmp_path):
    server, client = guarded
    other = changed(tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][:-1].clone()}, other / "model.safetensors")
    roll(server, other, 4)
    models = client.models.list().data
    assert "version 4 was refused" in models[0].refused
    assert name.rpartition(".")[2] in models[0].refused
    assert server.ask(ASK, client=client).model == "zoomer@3"
    assert outcomes(server, client, 4) == Counter({"B": 4})


def test_server_state_is_readable(guarded):
    server, _ = guarded
    assert read_server_state(Path(server.config.log_dir)).url == server.url
    assert read_server_state(Path(server.config.log_dir)).pid == os.getpid()
