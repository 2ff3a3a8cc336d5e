"""Checks and output of `vz-ray ask`."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from rich.console import Console

from vz_ray.config.serve import ServeConfig
from vz_ray.serve import ask
from vz_ray.utils.errors import UserError


def test_answer_starts_on_its_own_line():
    deltas = [
        {"reasoning_content": "blue "},
        {"reasoning_content": "border, square"},
        {"content": "C"},
        {"content": "!"},
    ]

    async def chunks() -> AsyncGenerator[dict[str, Any]]:
        for delta in deltas:
            yield {"choices": [{"delta": delta}]}

    output = io.StringIO()
    asyncio.run(ask._print_chunks(chunks(), Console(file=output)))
    assert output.getvalue() == "blue border, square\nC!"


def test_file_that_is_not_a_video_is_named_at_once(tmp_path):
    file = tmp_path / "notes.mp4"
    file.write_text("no video")
    with pytest.raises(UserError, match=str(file)):
        ask.run_ask(ServeConfig(), [str(file)], "Who?")


def test_missing_model_names_both_sources():
    with pytest.raises(UserError, match="set -s model=PATH for a local engine, or --server URL"):
        ask.run_ask(ServeConfig(), [], "Who?")
