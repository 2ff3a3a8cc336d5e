"""API keys from the environment, and Retry-After headers."""

from __future__ import annotations

import pytest

from vz_ray.utils.errors import UserError
from vz_ray.utils.openai_endpoint import api_key_from_env, retry_after_s


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "soon"}, 0.0),
        ({"date": "Sun, 06 Nov 1994 08:49:37 GMT", "retry-after": "Sun, 06 Nov 1994 08:49:39 GMT"}, 2.0),
    ],
)
def test_retry_after_accepts_seconds_and_dates(headers: dict[str, str], seconds: float) -> None:
    assert retry_after_s(headers) == seconds


def test_missing_api_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sesame")
    assert api_key_from_env("SOME_KEY", "the judge", "judge.api_key_env") == "sesame"
    assert api_key_from_env("", "the judge", "judge.api_key_env")
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(UserError, match=r"judge needs an API key: set SOME_KEY .* leave judge\.api_key_env empty"):
        api_key_from_env("SOME_KEY", "the judge", "judge.api_key_env")
