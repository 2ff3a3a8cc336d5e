"""Ray's job API, with deadlines, and with errors that name the address and the fix."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from vz_ray.utils.errors import UserError

QUERY_TIMEOUT_S = 15.0
"""How long the cluster may take to answer a question."""
SUBMIT_TIMEOUT_S = 600.0
"""How long sending the working directory and starting the job may take."""
AGENT_TIMEOUT_S = 60.0
"""How long a cluster may be without the process that starts jobs."""
_NO_AGENT = "No available agent"
_AGAIN_S = 1.0
ADDRESS_ENV_VARS = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
TOKEN_FILE = Path("~/.ray/auth_token")
_TOKEN = f"set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or write it to {TOKEN_FILE}"
RUN_METADATA_KEY = "vz_ray_run"
"""Metadata of a job: the name of the run that it is an attempt at."""


@dataclass(frozen=True, slots=True)
class JobInfo:
    """A job as the cluster tells it.

    Attributes:
        id: Of the submission.
        run: Name of the run that it is an attempt at; empty for jobs of others.
        status: `PENDING`, `RUNNING`, `STOPPED`, `SUCCEEDED` or `FAILED`.
        entrypoint: Its command.
        message: What the cluster says of its status.
        exit_code: Of its driver; None while it runs, and where that is not known.
        started_ms, ended_ms: Since the epoch; 0 if not yet.
    """

    id: str
    run: str
    status: str
    entrypoint: str
    message: str = ""
    exit_code: int | None = None
    started_ms: int = 0
    ended_ms: int = 0

    @property
    def finished(self) -> bool:
        return self.status in ("STOPPED", "SUCCEEDED", "FAILED")


def resolve_address(given: str) -> str:
    """The address of a cluster's job API: what was given, else what Ray's own variables say.

    Raises:
        UserError: There is none, or it is not one of HTTP.
    """
    address = given or next((found for name in ADDRESS_ENV_VARS if (found := os.environ.get(name))), "")
    if not address:
        raise UserError(
            "which cluster? give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS "
            "(kubectl port-forward service/NAME-head-svc 8265 makes it http://127.0.0.1:8265)"
        )
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"the address {address!r} is not that of a job API: it begins with http:// or https:// and has "
            "the dashboard's port, 8265"
        )
    return address.rstrip("/")


def configure_token_auth() -> None:
    """Makes Ray send a token where there is one: of `RAY_AUTH_TOKEN`, `RAY_AUTH_TOKEN_PATH` or `~/.ray`."""
    there = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if there or TOKEN_FILE.expanduser().is_file():
        os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")


class JobClient:
    """One cluster's jobs.

    Args:
        address: See `address_of`.
        any_ray: Put up with a cluster of another Ray version.

    Raises:
        UserError: Nobody answers there, the token is refused, or the cluster has another Ray.
    """

    def __init__(self, address: str, *, allow_version_mismatch: bool = False) -> None:
        configure_token_auth()
        self.address = address
        self.ray_version = self._knock(allow_version_mismatch)
        from ray.job_submission import JobSubmissionClient

        for noisy in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(noisy).setLevel(logging.WARNING)

        self._client: Any = JobSubmissionClient(address, headers=dict(_headers()))
        self._client._do_request = self._bounded(self._client._do_request)

    def _knock(self, any_ray: bool) -> str:
        """Ray's version there; answers in seconds where Ray's own client would wait for minutes."""
        import ray
        from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
        from ray.exceptions import AuthenticationError

        given = _headers()
        try:
            headers = {**given, **get_auth_headers_if_auth_enabled(given)}
        except AuthenticationError as error:
            raise UserError(f"RAY_AUTH_MODE is 'token', and none was found; {_TOKEN}") from error
        try:
            answer = httpx.get(f"{self.address}/api/version", headers=headers, timeout=QUERY_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise UserError(
                f"no job API answers at {self.address} ({error}): is the dashboard's port open, and "
                "forwarded to this machine? (kubectl port-forward service/NAME-head-svc 8265)"
            ) from error
        if answer.status_code in (401, 403):
            why = (
                "it wants a token, and none was found" if answer.status_code == 401 else "the token is wrong"
            )
            raise UserError(f"{self.address} refuses to answer: {why}; {_TOKEN}")
        try:
            version = str(answer.json()["ray_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.address} answers with status {answer.status_code}, and not as Ray's job API does"
            ) from error
        if version != ray.__version__ and not any_ray:
            raise UserError(
                f"the cluster at {self.address} runs Ray {version}, and this is written for "
                f"{ray.__version__}: use an image with that version, or --allow-version-mismatch to try it all the same"
            )
        return version

    @staticmethod
    def _bounded(request: Any) -> Any:
        """Ray's requests, which have no deadline of their own."""

        def bounded(method: str, endpoint: str, **options: Any) -> Any:
            seconds = SUBMIT_TIMEOUT_S if method in ("PUT", "POST") else QUERY_TIMEOUT_S
            return request(method, endpoint, **{"timeout": seconds, **options})

        return bounded

    def submit(
        self, id: str, entrypoint: str, *, run: str, working_dir: Path, env_vars: Mapping[str, str]
    ) -> None:
        """Sends a zip file as the working directory, and starts the job in it.

        A cluster that has just been started may have nobody yet who starts jobs: it is given `AGENT_TIMEOUT_S`.
        """
        until = time.monotonic() + AGENT_TIMEOUT_S
        with self._said("take the job"):
            while True:
                try:
                    self._client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=id,
                        metadata={RUN_METADATA_KEY: run},
                        runtime_env={"working_dir": str(working_dir), "env_vars": dict(env_vars)},
                    )
                    return
                except RuntimeError as error:
                    if _NO_AGENT not in str(error) or time.monotonic() > until:
                        raise
                time.sleep(_AGAIN_S)

    def list_jobs(self) -> list[JobInfo]:
        """All jobs that the cluster knows, oldest first."""
        with self._said("list its jobs"):
            found = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started_ms)

    def get_job(self, id: str) -> JobInfo:
        with self._said(f"tell of the job {id}"):
            return _job(self._client.get_job_info(id))

    def stop(self, id: str) -> bool:
        """Asks a job to stop; whether it ran. It may take until its grace period is over."""
        with self._said(f"stop the job {id}"):
            return bool(self._client.stop_job(id))

    async def tail_logs(self, id: str) -> AsyncIterator[str]:
        """What a job prints, from its beginning; ends when the job does, or with the connection."""
        async for lines in self._client.tail_job_logs(id):
            yield lines

    @contextmanager
    def _said(self, what: str) -> Iterator[None]:
        """Turns what Ray's client raises into one line."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise UserError(f"{self.address} did not {what}: its token was refused; {_TOKEN}") from error
        # What lies below Ray's client raises kinds of OSError.
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise UserError(f"{self.address} did not {what}: {_reason(str(error))}") from error


def _reason(text: str) -> str:
    """The last line of a traceback that a server sent, else the first of what it said."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return "it gave no reason"
    return lines[-1].rstrip(".") if "Traceback" in text else lines[0]


def _headers() -> dict[str, str]:
    """As Ray's own command takes them: a JSON object in `RAY_JOB_HEADERS`."""
    given = os.environ.get("RAY_JOB_HEADERS", "")
    try:
        return {str(name): str(value) for name, value in json.loads(given).items()} if given else {}
    except (ValueError, AttributeError) as error:
        raise UserError(f"RAY_JOB_HEADERS is {given!r}; it must be a JSON object of headers") from error


def _job(details: Any) -> JobInfo:
    return JobInfo(
        id=details.submission_id,
        run=(details.metadata or {}).get(RUN_METADATA_KEY, ""),
        status=str(getattr(details.status, "value", details.status)),
        entrypoint=details.entrypoint,
        message=details.message or "",
        exit_code=details.driver_exit_code,
        started_ms=details.start_time or 0,
        ended_ms=details.end_time or 0,
    )
