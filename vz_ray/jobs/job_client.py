"""Client of Ray's job API, with timeouts, and with errors that name the address and the fix."""

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
"""Timeout of a query."""
SUBMIT_TIMEOUT_S = 600.0
"""Timeout of an upload of the working directory, and of a job start."""
AGENT_TIMEOUT_S = 60.0
"""Maximum wait for the agent process that starts jobs, on a cluster that is still starting."""
_NO_AGENT = "No available agent"
_RETRY_INTERVAL_S = 1.0
ADDRESS_ENV_VARS = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
TOKEN_FILE = Path("~/.ray/auth_token")
_TOKEN_HINT = f"set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or write the token to {TOKEN_FILE}"
RUN_METADATA_KEY = "vz_ray_run"
"""Key of the run name in a job's metadata."""


@dataclass(frozen=True, slots=True)
class JobInfo:
    """State of a job.

    Attributes:
        id: Submission id.
        run: Name of the run; empty for jobs of other programs.
        status: `PENDING`, `RUNNING`, `STOPPED`, `SUCCEEDED` or `FAILED`.
        entrypoint: Command line.
        message: Message of the cluster about the status.
        exit_code: Exit code of the driver; None if it is running or the code is unknown.
        started_ms, ended_ms: Unix time, milliseconds; 0 if not yet started or ended.
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


def resolve_address(address: str) -> str:
    """Return the address of the job API; an empty `address` uses Ray's environment variables.

    Raises:
        UserError: No address is set, or it is not an HTTP address.
    """
    if not address:
        address = next((value for name in ADDRESS_ENV_VARS if (value := os.environ.get(name))), "")
    if not address:
        raise UserError(
            "no cluster address; give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS "
            "(kubectl port-forward service/NAME-head-svc 8265 makes it http://127.0.0.1:8265)"
        )
    if not address.startswith(("http://", "https://")):
        raise UserError(
            f"the address {address!r} is not a job API address; it must begin with http:// or https:// and have "
            "the dashboard's port, 8265"
        )
    return address.rstrip("/")


def configure_token_auth() -> None:
    """Enable Ray's token authentication if a token is set in the environment or in `~/.ray/auth_token`."""
    has_env_token = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if has_env_token or TOKEN_FILE.expanduser().is_file():
        os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")


class JobClient:
    """Client for the jobs of one cluster.

    Args:
        address: Address of the job API; see `resolve_address`.
        allow_version_mismatch: Accept a cluster with another Ray version.

    Raises:
        UserError: No job API responds at the address, the token is rejected, or the Ray version differs.
    """

    def __init__(self, address: str, *, allow_version_mismatch: bool = False) -> None:
        configure_token_auth()
        self.address = address
        self.ray_version = self._check_version(allow_version_mismatch)
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.WARNING)

        self._client: Any = JobSubmissionClient(address, headers=dict(_extra_headers()))
        self._client._do_request = self._with_timeouts(self._client._do_request)

    def _check_version(self, allow_version_mismatch: bool) -> str:
        """Return the cluster's Ray version. Fails within seconds; Ray's own client would block for minutes."""
        import ray
        from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
        from ray.exceptions import AuthenticationError

        extra_headers = _extra_headers()
        try:
            headers = {**extra_headers, **get_auth_headers_if_auth_enabled(extra_headers)}
        except AuthenticationError as error:
            raise UserError(f"RAY_AUTH_MODE is 'token', but no token is set; {_TOKEN_HINT}") from error
        try:
            response = httpx.get(f"{self.address}/api/version", headers=headers, timeout=QUERY_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise UserError(
                f"no job API responds at {self.address} ({error}); check that the dashboard's port is open and "
                "forwarded to this machine (kubectl port-forward service/NAME-head-svc 8265)"
            ) from error
        if response.status_code in (401, 403):
            reason = "a token is required, but no token is set" if response.status_code == 401 else "the token is wrong"
            raise UserError(f"{self.address} rejected the request: {reason}; {_TOKEN_HINT}")
        try:
            version = str(response.json()["ray_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.address} responded with status {response.status_code}; it is not Ray's job API"
            ) from error
        if version != ray.__version__ and not allow_version_mismatch:
            raise UserError(
                f"the cluster at {self.address} runs Ray {version}; vz_ray requires {ray.__version__}. Use an "
                "image with that version, or give --allow-version-mismatch to ignore the difference"
            )
        return version

    @staticmethod
    def _with_timeouts(send_request: Any) -> Any:
        """Add timeouts to the requests of Ray's client, which has none."""

        def send_with_timeout(method: str, endpoint: str, **options: Any) -> Any:
            timeout_s = SUBMIT_TIMEOUT_S if method in ("PUT", "POST") else QUERY_TIMEOUT_S
            return send_request(method, endpoint, **{"timeout": timeout_s, **options})

        return send_with_timeout

    def submit(self, id: str, entrypoint: str, *, run: str, working_dir: Path, env_vars: Mapping[str, str]) -> None:
        """Upload a zip file as the working directory and start the job.

        Retries for up to `AGENT_TIMEOUT_S` on a cluster whose job agent is still starting.
        """
        end_time = time.monotonic() + AGENT_TIMEOUT_S
        with self._user_errors("start the job"):
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
                    if _NO_AGENT not in str(error) or time.monotonic() > end_time:
                        raise
                time.sleep(_RETRY_INTERVAL_S)

    def list_jobs(self) -> list[JobInfo]:
        """Return all jobs of the cluster, oldest first."""
        with self._user_errors("list its jobs"):
            jobs = [_job_info(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(jobs, key=lambda job: job.started_ms)

    def get_job(self, id: str) -> JobInfo:
        with self._user_errors(f"return the job {id}"):
            return _job_info(self._client.get_job_info(id))

    def stop(self, id: str) -> bool:
        """Request a job to stop; return True if it was running. The stop may take the whole grace period."""
        with self._user_errors(f"stop the job {id}"):
            return bool(self._client.stop_job(id))

    def read_logs(self, id: str) -> str:
        """Return the job's output so far."""
        with self._user_errors(f"return the output of the job {id}"):
            return str(self._client.get_job_logs(id))

    async def tail_logs(self, id: str) -> AsyncIterator[str]:
        """Yield the job's output from its beginning, until the job or the connection ends."""
        async for lines in self._client.tail_job_logs(id):
            yield lines

    @contextmanager
    def _user_errors(self, action: str) -> Iterator[None]:
        """Convert exceptions of Ray's client to one-line errors."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise UserError(f"{self.address} did not {action}: the token was rejected; {_TOKEN_HINT}") from error
        # Network errors of Ray's client are OSErrors.
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            raise UserError(f"{self.address} did not {action}: {_short_reason(str(error))}") from error


def _short_reason(text: str) -> str:
    """Return the last line of a traceback, or the first line of another message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return "no reason given"
    return lines[-1].rstrip(".") if "Traceback" in text else lines[0]


def _extra_headers() -> dict[str, str]:
    """Return the headers in `RAY_JOB_HEADERS`, a JSON object, as Ray's own command does."""
    text = os.environ.get("RAY_JOB_HEADERS", "")
    try:
        return {str(name): str(value) for name, value in json.loads(text).items()} if text else {}
    except (ValueError, AttributeError) as error:
        raise UserError(f"RAY_JOB_HEADERS is {text!r}; it must be a JSON object of headers") from error


def _job_info(details: Any) -> JobInfo:
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
