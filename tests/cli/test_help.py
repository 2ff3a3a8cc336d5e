"""The help of every command shows examples that can be copied, and their configs load."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator

import click
import pytest
import typer
from typer.testing import CliRunner

from vz_ray.api import SCHEMAS
from vz_ray.cli import app
from vz_ray.config.load import load_config, split_arguments
from vz_ray.config.quickstart import quickstart_file

EXAMPLE = re.compile(r"Example: (.*?)(?:\n\n|\Z)", re.DOTALL)
"""An example up to the end of its paragraph."""


Words = tuple[str, ...]
"""A command as typed: `("distill", "reflect")`."""


def walk_commands(command: click.Command, words: Words = ()) -> Iterator[tuple[Words, click.Command]]:
    """Yield every command and group below `command` with the words that call it."""
    for name, child in getattr(command, "commands", {}).items():
        yield (*words, name), child
        yield from walk_commands(child, (*words, name))


COMMANDS = dict(walk_commands(typer.main.get_command(app)))


def examples_of(words: Words) -> list[str]:
    """Return the examples of a command's help text as a shell reads them, without the escapes of rich's markup."""
    text = inspect.cleandoc(COMMANDS[words].help or "")
    return [" ".join(example.split()).replace(r"\[", "[") for example in EXAMPLE.findall(text)]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_shows_every_example_unchanged(words: Words) -> None:
    examples = examples_of(words)
    assert examples, "give the command an example"
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"})
    shown = " ".join(result.output.split())
    for example in examples:
        assert shlex.split(example)[: len(words) + 1] == ["vz-ray", *words] or words in {("distill",), ("keys",)}
        assert example in shown


@pytest.mark.parametrize("command", sorted(SCHEMAS))
def test_configs_of_examples_load(command: str) -> None:
    words = tuple(command.split())
    for example in examples_of(words):
        arguments = [word for word in shlex.split(example)[len(words) + 1 :] if "=" in word or word.endswith(".yaml")]
        file, overrides = split_arguments(arguments)
        load_config(
            SCHEMAS[command], file or (quickstart_file(overrides) if command == "quickstart" else None), overrides
        )
