from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys

import pytest

from vz_ray.monitoring import logging_config
from vz_ray.monitoring.log_context import (
    JsonFormatter,
    RunIdentity,
    current_log_context,
    log_context,
    set_log_context,
)


def written(record: logging.LogRecord, **names) -> dict:
    text = JsonFormatter(**names).format(record)
    assert "\n" not in text
    return json.loads(text)


def record(message: str = "took %d s", *args, **more) -> logging.LogRecord:
    return logging.LogRecord("vz_ray.x", logging.WARNING, "x.py", 1, message, args or (3,), more.get("error"))


def test_a_record_says_what_it_is_about():
    with log_context(step=4, episode="4/t/0#0"):
        line = written(record(), run="agent", worker="rollout-1")
    assert line["message"] == "took 3 s"
    assert (line["level"], line["logger"]) == ("WARNING", "vz_ray.x")
    assert (line["run"], line["worker"]) == ("agent", "rollout-1")
    assert (line["iteration"], line["episode"]) == (4, "4/t/0#0")
    assert line["time"].endswith("Z")


def test_what_is_not_known_is_left_out():
    assert {"run", "worker", "iteration", "episode"} & set(written(record())) == set()


def test_an_exception_stays_in_its_line():
    try:
        raise ValueError("line one\nline two")
    except ValueError:
        line = written(record(error=sys.exc_info()))
    assert "ValueError: line one\nline two" in line["exception"]


def test_inner_words_add_to_outer_ones_and_end_with_their_block():
    with log_context(step=1):
        with log_context(episode="a"):
            assert current_log_context() == {"iteration": 1, "episode": "a"}
        assert current_log_context() == {"iteration": 1}
    assert current_log_context() == {}


async def test_tasks_do_not_mix_up_what_they_are_about():
    async def one(name: str) -> dict:
        with log_context(episode=name):
            await asyncio.sleep(0)
            return current_log_context()

    names = [str(number) for number in range(20)]
    assert await asyncio.gather(*map(one, names)) == [{"episode": name} for name in names]


@pytest.fixture
def _own_loggers():
    names = [logging_config.PACKAGE_LOGGER, *logging_config.ENGINE_LOGGERS]
    before = {n: (logging.getLogger(n).handlers[:], logging.getLogger(n).propagate) for n in names}
    yield
    logging.captureWarnings(False)
    for name, (handlers, propagate) in before.items():
        logging.getLogger(name).handlers[:] = handlers
        logging.getLogger(name).propagate = propagate


@pytest.mark.usefixtures("_own_loggers")
def test_a_driver_writes_files_and_terminal_as_objects(tmp_path, capsys, monkeypatch):
    for name in logging_config.QUIET_ENV:
        monkeypatch.setenv(name, "")
    logging_config.configure_logging(tmp_path, identity=RunIdentity("agent", "json"))
    with log_context(step=2):
        logging.getLogger("vz_ray.training.loop").warning("slow")
    logging.getLogger("vllm").info("started")
    own = json.loads((tmp_path / "vz_ray.log").read_text())
    assert (own["run"], own["iteration"], own["message"]) == ("agent", 2, "slow")
    assert json.loads((tmp_path / "engines.log").read_text())["logger"] == "vllm"
    assert json.loads(capsys.readouterr().err)["message"] == "slow"


def test_an_actor_names_itself_in_every_line():
    code = """
import logging
from vz_ray.monitoring import logs
from vz_ray.monitoring.log_context import Badge
logs.in_actor("rollout-3", Badge("agent", "json"))
logging.getLogger("vz_ray.rollout.rollout_worker").warning("late")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    line = json.loads(done.stderr)
    assert (line["run"], line["worker"], line["message"]) == ("agent", "rollout-3", "late")


def test_an_actor_that_writes_text_writes_as_before():
    code = """
import logging
from vz_ray.monitoring import logs
from vz_ray.monitoring.log_context import Badge
logs.in_actor("rollout-3", Badge("agent"))
logging.getLogger("vz_ray.rollout.rollout_worker").warning("late")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "late\n"


def test_a_rank_of_the_learner_is_told_by_its_number_the_first_too():
    assert written(record(), worker="learner-rank-0", rank=0)["rank"] == 0
    assert "rank" not in written(record(), worker="rollout-3")


async def test_a_loop_turns_to_its_next_iteration_without_a_block():
    async def loop(first: int) -> list[int | str]:
        found = []
        for iteration in range(first, first + 3):
            set_log_context(iteration=iteration)
            await asyncio.sleep(0)
            found.append(current_log_context()["iteration"])
        return found

    with log_context(worker="a"):
        assert await asyncio.gather(loop(0), loop(10)) == [[0, 1, 2], [10, 11, 12]]
        assert current_log_context() == {"worker": "a"}


REPLICA = """
import logging, logging.config, sys
from ray.serve._private.common import ServeComponentType
from ray.serve._private.logging_utils import configure_component_logger
from ray.serve.schema import LoggingConfig
from vz_ray.monitoring import logs
from vz_ray.monitoring.log_context import Badge, about
folder, form = sys.argv[1:]
configure_component_logger(
    component_name="vz_ray_Agent", component_id="x1", component_type=ServeComponentType.REPLICA,
    logging_config=LoggingConfig(logs_dir=folder, encoding=form.upper()), max_bytes=10**6, backup_count=1,
)
logs.in_replica("x1", Badge("zoomer", form))
# As vLLM does while it is imported, which closes every handler there is.
logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
with about(request="r7"):
    logging.getLogger("vz_ray.serve.agent").info("answered")
logging.getLogger("ray.serve").info("theirs")
logging.getLogger("vllm.engine").info("noise")
"""


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_replica_writes_where_ray_serve_does(tmp_path, form):
    command = [sys.executable, "-c", REPLICA, str(tmp_path), form]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("replica_vz_ray_Agent_x1*.log")
    lines = path.read_text().splitlines()
    if form == "text":
        assert [line.rpartition(" ")[2] for line in lines] == ["answered", "theirs"]
        return
    found = [json.loads(line) for line in lines]
    assert [line["message"] for line in found] == ["answered", "theirs", "noise"]
    assert {(line["run"], line["worker"]) for line in found} == {("zoomer", "x1")}
    assert [line.get("request") for line in found] == ["r7", None, None]
