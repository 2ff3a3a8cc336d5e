"""How a rule is known by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cluster.manifests.objects import Bundle

Rule = Callable[[Bundle], Iterator[str]]
"""Looks at everything and says what is wrong: the object, the value, the fix."""

RULES: dict[str, Rule] = {}
"""All rules by name, in the order in which they are asked."""


def rule(function: Rule) -> Rule:
    """Makes a function a rule; `gpus_are_whole` is called gpus-are-whole."""
    RULES[function.__name__.replace("_", "-")] = function
    return function
