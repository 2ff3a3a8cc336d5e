"""Job ids, command lines, validation before the upload, and following a job's output."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vz_ray.jobs import job_lifecycle, submit
from vz_ray.jobs.job_client import JobInfo
from vz_ray.jobs.job_lifecycle import STOP_GRACE_ENV_VAR, JobSpec, attempts_of_run, next_job_id
from vz_ray.jobs.submit import JobCommand, SubmitOptions, check_input_paths, run_submit
from vz_ray.jobs.working_dir import WorkingDirPackage, package_working_dir
from vz_ray.utils.errors import UserError

JOBS = [
    JobInfo("long", "long", "STOPPED", "exec a"),
    JobInfo("raysubmit_x", "", "RUNNING", "python other.py"),
    JobInfo("long-2", "long", "FAILED", "exec a"),
    JobInfo("short", "short", "RUNNING", "exec b"),
]


def test_attempts_are_numbered_and_ids_never_reused() -> None:
    assert [job.id for job in attempts_of_run(JOBS, "long")] == ["long", "long-2"]
    assert next_job_id(JOBS, "long") == "long-3"
    assert next_job_id(JOBS, "new") == "new"
    assert next_job_id([*JOBS, JobInfo("long-3", "", "FAILED", "exec c")], "long") == "long-4"


def test_entrypoint_replaces_shell_and_joins_cluster() -> None:
    job = JobSpec("long", "train", ["conf/x.yaml", "name=long", "reward.judge.model=a b"])
    assert job.entrypoint == (
        "exec python -m vz_ray.cli train conf/x.yaml name=long 'reward.judge.model=a b' ray.address=auto"
    )
    spec = JobSpec("long", "train", ["ray.address=head:6379"], {"A": "1"}, grace_s=90)
    assert spec.entrypoint.endswith("train ray.address=head:6379")
    assert spec.environment == {STOP_GRACE_ENV_VAR: "90", "A": "1"}


@pytest.mark.parametrize("name", ["", "a b", "../up", "-x"])
def test_invalid_job_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is used as a job id"):
        JobSpec(name, "train", [])


def test_command_is_validated_before_upload() -> None:
    command = JobCommand.parse(["conf/laptop.yaml", "name=long", "runs=/runs"])
    assert (command.command, command.config.name) == ("train", "long")
    assert JobCommand.parse(["quickstart"]).config.name == "quickstart"
    assert JobCommand.parse(["eval", "conf/eval/needle.yaml", "model=m"]).command == "eval"
    with pytest.raises(UserError, match="'serve' cannot run as a job; use one of train, sft, eval"):
        JobCommand.parse(["serve", "conf/serve/tiny.yaml"])
    with pytest.raises(UserError, match=r"did you mean train\.max_steps"):
        JobCommand.parse(["conf/laptop.yaml", "train.max_step=3"])
    with pytest.raises(UserError, match="got 2 config files"):
        JobCommand.parse(["conf/laptop.yaml", "conf/ablation.yaml"])


def test_relative_run_directory_is_refused(tmp_path: Path) -> None:
    command = JobCommand.parse(["conf/laptop.yaml", "name=long"])
    with pytest.raises(UserError, match=r"runs is 'runs', a relative path in the job's working directory"):
        run_submit(command, SubmitOptions("http://127.0.0.1:9", tmp_path), check_only=False)


@pytest.fixture
def upload(tmp_path: Path) -> WorkingDirPackage:
    """Working directory whose `data/` git ignores, as in a checkout of vz_ray."""
    for name in ("data/train.json", "tracked/train.json", "tracked/validation.json", "model/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[]")
    (tmp_path / ".gitignore").write_text("/data/\n")
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    return package_working_dir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.train=data/train.json"], r"data\.train is 'data/train\.json'.*not uploaded: git ignores it"),
        (
            ["data.train=gone.json"],
            r"it does not exist in .*: data\.train=/shared/gone\.json",
        ),
        (["data.train=tracked/train.json", "model=models/gone"], "model is 'models/gone'"),
        (["data.train=tracked/train.json", "train.validate_every=1"], "data.validation is 'data/needle/validation"),
        (["sft", "data=data/train.json"], "data is 'data/train.json'"),
        (["eval", "conf/eval/needle.yaml"], "benchmarks.needle.annotations is 'data/needle/test.json'"),
        (["eval", "conf/eval/needle.yaml", "data=data"], "data is 'data'"),
        (["eval", "conf/eval/needle.yaml", "data=tracked", "compare.sft=gone"], "compare.sft is 'gone'"),
    ],
)
def test_input_outside_of_upload_is_refused(upload: WorkingDirPackage, arguments: list[str], message: str) -> None:
    command = [] if arguments[0] in ("sft", "eval") else ["conf/laptop.yaml"]
    with pytest.raises(UserError, match=message):
        check_input_paths(JobCommand.parse([*arguments, *command]).config, upload)


@pytest.mark.parametrize(
    "arguments",
    [
        ["conf/laptop.yaml", "data.train=tracked/train.json", "model=./model/"],
        ["conf/laptop.yaml", "data.train=/videos/train.json"],
        ["quickstart"],
        ["ablate"],
        ["sft", "data=tracked"],
    ],
)
def test_inputs_of_upload_and_shipped_models_are_accepted(upload: WorkingDirPackage, arguments: list[str]) -> None:
    check_input_paths(JobCommand.parse(arguments).config, upload)


class FakeJobClient:
    """Job client whose connections each yield the log from its beginning, or raise, or hang at None."""

    address = "http://head:8265"

    def __init__(self, connections: list[object], finished_after: int) -> None:
        self._connections, self._finished_after, self.num_opened = connections, finished_after, 0

    async def tail_logs(self, id: str) -> AsyncIterator[str]:
        lines = self._connections[min(self.num_opened, len(self._connections) - 1)]
        self.num_opened += 1
        if isinstance(lines, Exception):
            raise lines
        for line in lines:  # type: ignore[attr-defined]
            if line is None:
                await asyncio.sleep(3600)
            yield line

    def get_job(self, id: str) -> JobInfo:
        return JobInfo(id, "long", "SUCCEEDED" if self.num_opened >= self._finished_after else "RUNNING", "exec a")


async def follow(client: FakeJobClient) -> tuple[str, JobInfo]:
    output: list[str] = []
    job = await job_lifecycle.follow_job(client, "long", output.append)  # type: ignore[arg-type]
    return "".join(output), job


@pytest.fixture
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    delays = {
        "_POLL_INTERVAL_S": 0.0,
        "_RECONNECT_DELAY_S": 0.0,
        "_STATUS_CHECK_S": 0.02,
        "_RECONNECT_AFTER_S": 0.06,
    }
    for name, seconds in delays.items():
        monkeypatch.setattr(job_lifecycle, name, seconds)


@pytest.mark.usefixtures("short_delays")
async def test_log_is_printed_once_over_several_connections() -> None:
    broken = ConnectionError("gone")
    client = FakeJobClient(
        [["one\n", "two\n"], broken, ["one\ntwo\n", "three\n", None], ["one\n", "two\nthree\nfour\n"]], 4
    )
    text, job = await follow(client)
    assert text == "one\ntwo\nthree\nfour\n"
    assert (job.status, client.num_opened) == ("SUCCEEDED", 4)


@pytest.mark.usefixtures("short_delays")
async def test_job_end_behind_dead_connection_is_detected() -> None:
    text, job = await follow(FakeJobClient([["one\n", None]], 1))
    assert (text, job.finished) == ("one\n", True)


@pytest.mark.usefixtures("short_delays")
async def test_lost_cluster_fails_with_attach_hint() -> None:
    with pytest.raises(UserError, match=r"31 consecutive attempts \(gone\).*--attach long"):
        await follow(FakeJobClient([ConnectionError("gone")], 10**6))


def test_killed_driver_names_the_signal_and_the_cause() -> None:
    job = JobInfo("long", "long", "FAILED", "exec a", exit_code=-9, started_ms=1000, ended_ms=61_000)
    assert submit.describe_outcome(job) == (
        "was killed by SIGKILL, probably because its node ran out of memory, after 1 min 00 s"
    )
    assert (
        submit.describe_outcome(JobInfo("long", "long", "FAILED", "exec a", exit_code=-40)) == "was killed by signal 40"
    )


class StoppableClient:
    """Job client of one job that ends with a status and an output when it is stopped."""

    address = "http://head:8265"

    def __init__(self, status: str, output: str) -> None:
        self._status, self._output, self._stopped = status, output, False

    def list_jobs(self) -> list[JobInfo]:
        return [self.get_job("long")]

    def get_job(self, id: str) -> JobInfo:
        return JobInfo(id, "long", self._status if self._stopped else "RUNNING", "exec a")

    def stop(self, id: str) -> None:
        self._stopped = True

    def read_logs(self, id: str) -> str:
        return self._output


@pytest.mark.parametrize(
    ("status", "output", "exit_status", "message"),
    [
        (
            "STOPPED",
            "step 12\nvz-ray: stopped by SIGTERM; saved the run after 12 steps; the same command resumes\n",
            0,
            "stopped by SIGTERM; saved the run after 12 steps; the same command resumes",
        ),
        ("STOPPED", "step 12\n", 1, "the run did not report what it saved: it was killed or failed before."),
        ("FAILED", "vz-ray: the disk is full\n", 1, "Submit with a longer --grace-s than 600"),
        ("SUCCEEDED", "exported the policy\n", 0, "job long succeeded"),
    ],
)
def test_stop_reports_what_was_saved(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: str,
    output: str,
    exit_status: int,
    message: str,
) -> None:
    monkeypatch.setattr(submit, "JobClient", lambda *_, **__: StoppableClient(status, output))
    assert submit.run_stop("long", SubmitOptions("http://head:8265")) == exit_status
    assert message in capsys.readouterr().out
