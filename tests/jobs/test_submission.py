"""How a run becomes a job: its id, its command line, what is refused before anything is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from vz_ray.jobs.client import Job
from vz_ray.jobs.submission import GRACE_VARIABLE, Submission, attempts, next_id
from vz_ray.observe.errors import UserError
from vz_ray.submitting import Sending, Wanted, run_submit

JOBS = [
    Job("long", "long", "STOPPED", "exec a"),
    Job("raysubmit_x", "", "RUNNING", "python other.py"),
    Job("long-2", "long", "FAILED", "exec a"),
    Job("short", "short", "RUNNING", "exec b"),
]


def test_attempts_at_a_run_are_numbered_and_no_id_is_used_twice() -> None:
    assert [job.id for job in attempts(JOBS, "long")] == ["long", "long-2"]
    assert next_id(JOBS, "long") == "long-3"
    assert next_id(JOBS, "new") == "new"
    assert next_id([*JOBS, Job("long-3", "", "FAILED", "theirs")], "long") == "long-4"


def test_the_command_line_replaces_the_shell_and_joins_the_cluster() -> None:
    job = Submission("long", "train", ["conf/x.yaml", "name=long", "reward.judge.model=a b"])
    assert job.entrypoint == (
        "exec python -m vz_ray.cli train conf/x.yaml name=long 'reward.judge.model=a b' ray.address=auto"
    )
    given = Submission("long", "train", ["ray.address=head:6379"], {"A": "1"}, grace_s=90)
    assert given.entrypoint.endswith("train ray.address=head:6379")
    assert given.environment == {GRACE_VARIABLE: "90", "A": "1"}


@pytest.mark.parametrize("name", ["", "a b", "../up", "-x"])
def test_a_name_that_cannot_be_an_id_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="jobs are called by it"):
        Submission(name, "train", [])


def test_what_is_run_is_read_before_it_is_sent() -> None:
    wanted = Wanted.read(["conf/tiny.yaml", "name=long", "runs=/runs"])
    assert (wanted.command, wanted.config.name) == ("train", "long")
    assert Wanted.read(["quickstart"]).config.name == "quickstart"
    assert Wanted.read(["eval", "conf/eval/needle.yaml", "model=m"]).command == "eval"
    with pytest.raises(UserError, match="'serve' is no job; it is one of train, sft, eval"):
        Wanted.read(["serve", "conf/serve/tiny.yaml"])
    with pytest.raises(UserError, match=r"there is no key train\.iteration; did you mean train.iterations"):
        Wanted.read(["conf/tiny.yaml", "train.iteration=3"])
    with pytest.raises(UserError, match="two config files"):
        Wanted.read(["conf/tiny.yaml", "conf/ablate.yaml"])


def test_a_run_directory_that_would_go_with_the_job_is_refused(tmp_path: Path) -> None:
    wanted = Wanted.read(["conf/tiny.yaml", "name=long"])
    with pytest.raises(UserError, match=r"runs is 'runs', which would be in the job's own directory"):
        run_submit(wanted, Sending("http://127.0.0.1:9", tmp_path), check_only=False)
