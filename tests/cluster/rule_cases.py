"""How right manifests are broken in one place, and what must then be found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cluster.manifests import Bundle
from cluster.manifests.rules import RULES

Manifests = list[dict[str, Any]]
HEAD, LEARNER, ROLLOUT, CLIPS = -1, 0, 1, 2


def workload(manifests: Manifests) -> dict[str, Any]:
    return next(m for m in manifests if m["kind"] in ("RayJob", "RayService", "RayCluster"))


def cluster(manifests: Manifests) -> dict[str, Any]:
    spec = workload(manifests)["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def group(manifests: Manifests, index: int) -> dict[str, Any]:
    return (
        cluster(manifests)["headGroupSpec"]
        if index == HEAD
        else cluster(manifests)["workerGroupSpecs"][index]
    )


def pod(manifests: Manifests, index: int) -> dict[str, Any]:
    return group(manifests, index)["template"]["spec"]


def main(manifests: Manifests, index: int) -> dict[str, Any]:
    return pod(manifests, index)["containers"][0]


def disk(manifests: Manifests, index: int, name: str) -> dict[str, Any]:
    return next(volume for volume in pod(manifests, index)["volumes"] if volume["name"] == name)


def entry(manifests: Manifests, old: str, new: str) -> None:
    spec = workload(manifests)["spec"]
    key = "entrypoint" if "entrypoint" in spec else "serveConfigV2"
    assert old in spec[key]
    spec[key] = spec[key].replace(old, new)


def env(manifests: Manifests, index: int, name: str, **value: Any) -> None:
    entries = main(manifests, index)["env"]
    entries[:] = [one for one in entries if one["name"] != name] + [{"name": name, **value}]


def without(manifests: Manifests, kind: str, name: str) -> None:
    manifests[:] = [m for m in manifests if (m["kind"], m["metadata"]["name"]) != (kind, name)]


def named(manifests: Manifests, kind: str, name: str) -> dict[str, Any]:
    return next(m for m in manifests if (m["kind"], m["metadata"]["name"]) == (kind, name))


def hook(manifests: Manifests, index: int, *command: str) -> None:
    main(manifests, index)["lifecycle"]["preStop"]["exec"]["command"] = list(command)


def resources(manifests: Manifests, index: int, kind: str, **amounts: str) -> None:
    main(manifests, index)["resources"][kind] |= {
        name.replace("_", "-"): amount for name, amount in amounts.items()
    }


PAPER, SERVE, ELASTIC = "16gpu-paper", "serve", "spot"

Case = tuple[str, str, Callable[[Manifests], object], str]
"""A rule, an overlay, what breaks it, and words of the message."""


def only(rule: str, manifests: Manifests, words: str) -> None:
    """The rule says this, and no other rule says anything."""
    bundle = Bundle(manifests)
    found = {name: list(check(bundle)) for name, check in RULES.items()}
    assert any(words in message for message in found[rule]), found[rule]
    assert [name for name, messages in found.items() if messages] == [rule]


def rules_of(module: str) -> set[str]:
    """Names of the rules that a file has."""
    return {name for name, rule in RULES.items() if rule.__module__.endswith(f".{module}")}
