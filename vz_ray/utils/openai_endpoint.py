"""Client of an OpenAI-compatible chat endpoint, for the judge and the teacher. Callers decide about retries."""

from __future__ import annotations

import os
import random
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from vz_ray.utils.errors import UserError
from vz_ray.utils.timeouts import StepTimeout, with_timeout

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_NO_KEY = "none"
"""Placeholder for servers without keys; the client library requires a value."""
_TRANSIENT_STATUSES = (408, 409, 425, 429)
"""Statuses below 500 that a retry may resolve."""
_MAX_BACKOFF_S = 60.0


class EndpointError(Exception):
    """A request failed, or its reply is unusable.

    Attributes:
        reason: Kind of failure, for metrics: `timeout`, `connection`, `status 500`, `malformed`, ...
        status: HTTP status of an error response; 0 for other failures.
        retry_after_s: Minimum delay before a retry that the server requests.
    """

    def __init__(self, reason: str, detail: str, *, status: int = 0, retry_after_s: float = 0.0) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail
        self.status, self.retry_after_s = status, retry_after_s

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"

    @property
    def is_transient(self) -> bool:
        """Whether a retry may succeed: timeout, lost connection, 429, 5xx."""
        is_lost = self.reason in ("timeout", "connection")
        return is_lost or self.status in _TRANSIENT_STATUSES or self.status >= 500

    def retry_delay_s(self, attempt: int, backoff_s: float) -> float:
        """Return the wait after failed attempt `attempt` (from 1): exponential backoff, or a longer Retry-After."""
        backoff_s *= 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
        return max(min(backoff_s, _MAX_BACKOFF_S), self.retry_after_s)


@dataclass(frozen=True, slots=True)
class ChatCompletion:
    """Reply of a chat endpoint.

    Attributes:
        text: Generated text; empty if the server returned none (content filter, refusal).
        finish_reason: Finish reason of the server: `stop`, `length`, ...
        token_counts: Prompt and completion tokens; None if the server reported no valid counts.
    """

    text: str
    finish_reason: str
    token_counts: tuple[int, int] | None


class ChatEndpoint:
    """HTTP client of one endpoint. Imports and connections happen on the first request.

    Args:
        base_url: Address of the API.
        api_key: Key, see `api_key_from_env`.
        request_timeout_s: Maximum timeout of a request.
    """

    def __init__(self, base_url: str, api_key: str, request_timeout_s: float) -> None:
        self._base_url, self._api_key, self._request_timeout_s = base_url, api_key, request_timeout_s
        self._client: AsyncOpenAI | None = None

    async def complete(self, body: Mapping[str, Any], timeout_s: float) -> ChatCompletion:
        """Send one chat completion request.

        Args:
            body: The request with `model` and `messages`; other parameters are sent unchanged.
            timeout_s: Timeout of this request.

        Raises:
            EndpointError: The request failed or the response is malformed.
        """
        import openai

        url = self._base_url
        request = self._start_request(body)
        try:
            response = await with_timeout(request, timeout_s, target=url, operation="a chat completion")
        except (StepTimeout, openai.APITimeoutError) as error:
            raise EndpointError("timeout", str(error)) from error
        except openai.APIConnectionError as error:
            raise EndpointError("connection", f"{url}: {error.__cause__ or error}") from error
        except openai.APIStatusError as error:
            raise EndpointError(
                f"status {error.status_code}",
                f"{url}: {error.message[:200]}",
                status=error.status_code,
                retry_after_s=retry_after_s(error.response.headers),
            ) from error
        except (openai.APIError, ValueError) as error:
            raise EndpointError("malformed", f"{url}: {error}") from error
        return _parse_completion(response, body["model"])

    def _start_request(self, body: Mapping[str, Any]) -> Coroutine[Any, Any, Any]:
        """Create the request. Not async, so that the creation of the client does not count towards the timeout."""
        from openai import AsyncOpenAI

        if self._client is None:
            self._client = AsyncOpenAI(
                api_key=self._api_key,
                base_url=self._base_url,
                timeout=self._request_timeout_s,
                max_retries=0,  # callers limit and account for each retry
            )
        required = {name: body[name] for name in ("model", "messages")}
        extra_body = {name: value for name, value in body.items() if name not in required}
        create: Any = self._client.chat.completions.create
        request: Coroutine[Any, Any, Any] = create(**required, extra_body=extra_body)
        return request

    async def close(self) -> None:
        """Close the connections. The next request opens them again."""
        if self._client is not None:
            await self._client.close()
            self._client = None


def _parse_completion(response: Any, model: str) -> ChatCompletion:
    try:
        choice = response.choices[0]
        text, finish_reason = choice.message.content or "", str(choice.finish_reason or "")
    except (AttributeError, IndexError, TypeError) as error:
        raise EndpointError("malformed", f"{model} replied {str(response)[:120]!r}") from error
    if not isinstance(text, str):
        raise EndpointError("malformed", f"{model} returned no text: {str(text)[:120]!r}")
    usage = getattr(response, "usage", None)
    counts = (getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None))
    is_reported = all(isinstance(count, int) and count >= 0 for count in counts)
    return ChatCompletion(text, finish_reason, counts if is_reported else None)  # type: ignore[arg-type]


def api_key_from_env(env_var: str, client: str, config_key: str, environment: str = "the environment") -> str:
    """Return the API key in an environment variable.

    Args:
        env_var: Name of the variable; empty if the server needs no key.
        client: Component that needs the key, for the error.
        config_key: Config key that names the variable, for the error.
        environment: Process whose environment is read, for the error.

    Raises:
        UserError: The variable is not set.
    """
    if not env_var:
        return _NO_KEY
    key = os.environ.get(env_var, "")
    if not key:
        raise UserError(
            f"{client} needs an API key: set {env_var} in {environment}, or leave {config_key} empty for a "
            "server without keys"
        )
    return key


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Return the seconds in a Retry-After header. A date is compared with the server's own clock."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        pass
    try:
        retry_at, server_time = parsedate_to_datetime(value), parsedate_to_datetime(headers.get("date", ""))
        return max(0.0, (retry_at - server_time).total_seconds())
    except (ValueError, TypeError):
        return 0.0
