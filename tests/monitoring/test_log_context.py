"""Log context fields and JSON log lines of drivers, actors and replicas."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from contextvars import ContextVar

import pytest

from vz_ray.monitoring import log_context as log_context_module
from vz_ray.monitoring import logging_config
from vz_ray.monitoring.log_context import (
    JsonFormatter,
    RunIdentity,
    current_log_context,
    log_context,
    set_log_context,
)


@pytest.fixture(autouse=True)
def empty_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts without fields; training loops of other tests set some in this process."""
    monkeypatch.setattr(log_context_module, "_context", ContextVar("log_context", default=None))


def format_record(record: logging.LogRecord, **fields) -> dict:
    text = JsonFormatter(**fields).format(record)
    assert "\n" not in text
    return json.loads(text)


def make_record(message: str = "took %d s", *args, error=None) -> logging.LogRecord:
    return logging.LogRecord("vz_ray.x", logging.WARNING, "x.py", 1, message, args or (3,), error)


def test_record_has_process_and_context_fields():
    with log_context(step=4, episode="4/t/0#0"):
        line = format_record(make_record(), run="agent", worker_name="rollout-1")
    assert line["message"] == "took 3 s"
    assert (line["level"], line["logger"]) == ("WARNING", "vz_ray.x")
    assert (line["run"], line["worker"]) == ("agent", "rollout-1")
    assert (line["step"], line["episode"]) == (4, "4/t/0#0")
    assert line["time"].endswith("Z")


def test_unknown_fields_are_omitted():
    assert {"run", "worker", "step", "episode"} & set(format_record(make_record())) == set()


def test_exception_stays_in_one_line():
    try:
        raise ValueError("line one\nline two")
    except ValueError:
        line = format_record(make_record(error=sys.exc_info()))
    assert "ValueError: line one\nline two" in line["exception"]


def test_nested_context_adds_fields_and_ends_with_its_block():
    with log_context(step=1):
        with log_context(episode="a"):
            assert current_log_context() == {"step": 1, "episode": "a"}
        assert current_log_context() == {"step": 1}
    assert current_log_context() == {}


async def test_concurrent_tasks_have_separate_contexts():
    async def context_of(name: str) -> dict:
        with log_context(episode=name):
            await asyncio.sleep(0)
            return current_log_context()

    names = [str(number) for number in range(20)]
    assert await asyncio.gather(*map(context_of, names)) == [{"episode": name} for name in names]


@pytest.mark.usefixtures("restored_loggers")
def test_driver_writes_json_to_files_and_terminal(tmp_path, capsys, monkeypatch):
    for name in logging_config.QUIET_ENV:
        monkeypatch.setenv(name, "")
    logging_config.configure_logging(tmp_path, identity=RunIdentity("agent", "json"))
    with log_context(step=2):
        logging.getLogger("vz_ray.training.loop").warning("slow")
    logging.getLogger("vllm").info("started")
    line = json.loads((tmp_path / "vz_ray.log").read_text())
    assert (line["run"], line["step"], line["message"]) == ("agent", 2, "slow")
    assert json.loads((tmp_path / "engines.log").read_text())["logger"] == "vllm"
    assert json.loads(capsys.readouterr().err)["message"] == "slow"


def test_json_actor_log_has_the_worker_name():
    code = """
import logging
from vz_ray.monitoring.log_context import RunIdentity
from vz_ray.monitoring.logging_config import configure_actor_logging
configure_actor_logging("rollout-3", RunIdentity("agent", "json"))
logging.getLogger("vz_ray.rollout.rollout_worker").warning("late")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    line = json.loads(result.stderr)
    assert (line["run"], line["worker"], line["message"]) == ("agent", "rollout-3", "late")


def test_text_actor_log_is_unchanged():
    code = """
import logging
from vz_ray.monitoring.log_context import RunIdentity
from vz_ray.monitoring.logging_config import configure_actor_logging
configure_actor_logging("rollout-3", RunIdentity("agent"))
logging.getLogger("vz_ray.rollout.rollout_worker").warning("late")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stderr == "late\n"


def test_learner_rank_zero_is_recorded():
    assert format_record(make_record(), worker_name="learner-rank-0", rank=0)["rank"] == 0
    assert "rank" not in format_record(make_record(), worker_name="rollout-3")


async def test_set_log_context_applies_without_a_block():
    async def loop(first: int) -> list[int | str]:
        steps = []
        for step in range(first, first + 3):
            set_log_context(step=step)
            await asyncio.sleep(0)
            steps.append(current_log_context()["step"])
        return steps

    with log_context(worker="a"):
        assert await asyncio.gather(loop(0), loop(10)) == [[0, 1, 2], [10, 11, 12]]
        assert current_log_context() == {"worker": "a"}


REPLICA = """
import logging, logging.config, sys
from ray.serve._private.common import ServeComponentType
from ray.serve._private.logging_utils import configure_component_logger
from ray.serve.schema import LoggingConfig
from vz_ray.monitoring.log_context import RunIdentity, log_context
from vz_ray.monitoring.logging_config import configure_replica_logging
folder, log_format = sys.argv[1:]
configure_component_logger(
    component_name="vz_ray_Agent", component_id="x1", component_type=ServeComponentType.REPLICA,
    logging_config=LoggingConfig(logs_dir=folder, encoding=log_format.upper()), max_bytes=10**6, backup_count=1,
)
configure_replica_logging("x1", RunIdentity("zoomer", log_format))
# The import of vLLM does this; it closes every handler.
logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
with log_context(request="r7"):
    logging.getLogger("vz_ray.serve.agent").info("answered")
logging.getLogger("ray.serve").info("served")
logging.getLogger("vllm.engine").info("noise")
"""


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_replica_writes_to_the_ray_serve_log(tmp_path, log_format):
    command = [sys.executable, "-c", REPLICA, str(tmp_path), log_format]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    [path] = tmp_path.glob("replica_vz_ray_Agent_x1*.log")
    lines = path.read_text().splitlines()
    if log_format == "text":
        assert [line.rpartition(" ")[2] for line in lines] == ["answered", "served"]
        return
    records = [json.loads(line) for line in lines]
    assert [line["message"] for line in records] == ["answered", "served", "noise"]
    assert {(line["run"], line["worker"]) for line in records} == {("zoomer", "x1")}
    assert [line.get("request") for line in records] == ["r7", None, None]
