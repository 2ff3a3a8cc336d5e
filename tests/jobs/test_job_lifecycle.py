"""How a run becomes a job: its id, its command line, what is refused before anything is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vz_ray.jobs import job_lifecycle
from vz_ray.jobs.job_client import JobInfo
from vz_ray.jobs.job_lifecycle import STOP_GRACE_ENV_VAR, JobSpec, attempts_of_run, next_job_id
from vz_ray.jobs.submit import JobCommand, SubmitOptions, run_submit
from vz_ray.utils.errors import UserError

JOBS = [
    JobInfo("long", "long", "STOPPED", "exec a"),
    JobInfo("raysubmit_x", "", "RUNNING", "python other.py"),
    JobInfo("long-2", "long", "FAILED", "exec a"),
    JobInfo("short", "short", "RUNNING", "exec b"),
]


def test_attempts_at_a_run_are_numbered_and_no_id_is_used_twice() -> None:
    assert [job.id for job in attempts_of_run(JOBS, "long")] == ["long", "long-2"]
    assert next_job_id(JOBS, "long") == "long-3"
    assert next_job_id(JOBS, "new") == "new"
    assert next_job_id([*JOBS, JobInfo("long-3", "", "FAILED", "theirs")], "long") == "long-4"


def test_the_command_line_replaces_the_shell_and_joins_the_cluster() -> None:
    job = JobSpec("long", "train", ["conf/x.yaml", "name=long", "reward.judge.model=a b"])
    assert job.entrypoint == (
        "exec python -m vz_ray.cli train conf/x.yaml name=long 'reward.judge.model=a b' ray.address=auto"
    )
    given = JobSpec("long", "train", ["ray.address=head:6379"], {"A": "1"}, grace_s=90)
    assert given.entrypoint.endswith("train ray.address=head:6379")
    assert given.environment == {STOP_GRACE_ENV_VAR: "90", "A": "1"}


@pytest.mark.parametrize("name", ["", "a b", "../up", "-x"])
def test_a_name_that_cannot_be_an_id_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="jobs are called by it"):
        JobSpec(name, "train", [])


def test_what_is_run_is_read_before_it_is_sent() -> None:
    wanted = JobCommand.parse(["conf/tiny.yaml", "name=long", "runs=/runs"])
    assert (wanted.command, wanted.config.name) == ("train", "long")
    assert JobCommand.parse(["quickstart"]).config.name == "quickstart"
    assert JobCommand.parse(["eval", "conf/eval/needle.yaml", "model=m"]).command == "eval"
    with pytest.raises(UserError, match="'serve' is no job; it is one of train, sft, eval"):
        JobCommand.parse(["serve", "conf/serve/tiny.yaml"])
    with pytest.raises(UserError, match=r"there is no key train\.iteration; did you mean train.max_steps"):
        JobCommand.parse(["conf/tiny.yaml", "train.iteration=3"])
    with pytest.raises(UserError, match="two config files"):
        JobCommand.parse(["conf/tiny.yaml", "conf/ablation.yaml"])


def test_a_run_directory_that_would_go_with_the_job_is_refused(tmp_path: Path) -> None:
    wanted = JobCommand.parse(["conf/tiny.yaml", "name=long"])
    with pytest.raises(UserError, match=r"runs is 'runs', which would be in the job's own directory"):
        run_submit(wanted, SubmitOptions("http://127.0.0.1:9", tmp_path), check_only=False)


class FakeJobClient:
    """A job API whose connections each give the log from its beginning, as far as they come."""

    address = "http://head:8265"

    def __init__(self, connections: list[object], over_after: int) -> None:
        self._connections, self._over_after, self.opened = connections, over_after, 0

    async def tail_logs(self, id: str) -> AsyncIterator[str]:
        said = self._connections[min(self.opened, len(self._connections) - 1)]
        self.opened += 1
        if isinstance(said, Exception):
            raise said
        for line in said:  # type: ignore[attr-defined]
            if line is None:
                await asyncio.sleep(3600)
            yield line

    def get_job(self, id: str) -> JobInfo:
        return JobInfo(id, "long", "SUCCEEDED" if self.opened >= self._over_after else "RUNNING", "exec a")


async def followed(line: FakeJobClient) -> tuple[str, JobInfo]:
    shown: list[str] = []
    job = await job_lifecycle.follow_job(line, "long", shown.append)  # type: ignore[arg-type]
    return "".join(shown), job


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("_POLL_S", 0.0), ("_AGAIN_S", 0.0), ("_ASK_S", 0.02), ("_SILENT_S", 0.06)):
        monkeypatch.setattr(job_lifecycle, name, seconds)


@pytest.mark.usefixtures("at_once")
async def test_a_log_is_shown_once_through_connections_that_break_and_fall_silent() -> None:
    broken = ConnectionError("gone")
    line = FakeJobClient(
        [["one\n", "two\n"], broken, ["one\ntwo\n", "three\n", None], ["one\n", "two\nthree\nfour\n"]], 4
    )
    text, job = await followed(line)
    assert text == "one\ntwo\nthree\nfour\n"
    assert (job.status, line.opened) == ("SUCCEEDED", 4)


@pytest.mark.usefixtures("at_once")
async def test_a_job_that_ended_behind_a_dead_connection_is_not_waited_for() -> None:
    text, job = await followed(FakeJobClient([["one\n", None]], 1))
    assert (text, job.finished) == ("one\n", True)


@pytest.mark.usefixtures("at_once")
async def test_a_cluster_that_is_gone_is_given_up_and_the_way_back_is_told() -> None:
    with pytest.raises(UserError, match=r"31 times in a row \(gone\).*--attach long"):
        await followed(FakeJobClient([ConnectionError("gone")], 10**6))
