"""What is asked of an overlay: that it renders, that schemas know it, that no rule objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.manifests import kustomize, schema
from cluster.manifests.kustomize import Manifest, identity
from cluster.manifests.objects import Bundle
from cluster.manifests.rules import RULES


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to mend.

    Attributes:
        rule: Name of the rule; `schema`, or `kustomize` where the real one makes something else.
        message: The object, the value and the fix.
    """

    rule: str
    message: str

    def __str__(self) -> str:
        return f"[{self.rule}] {self.message}"


def check(manifests: Sequence[Manifest]) -> list[Finding]:
    """What schemas and rules have against manifests; rules alone where the schemas are content.

    Rules read the fields that schemas promise, so a manifest of another shape is not put to them.
    """
    found = [
        Finding("schema", f"{' '.join(identity(manifest))}: {fault}")
        for manifest in manifests
        for fault in schema.schema_errors(manifest)
    ]
    if found:
        return found
    bundle = Bundle(manifests)
    return [Finding(name, message) for name, rule in RULES.items() for message in rule(bundle)]


def check_folders(folders: Sequence[Path]) -> list[Finding]:
    """Renders folders that are applied together, and checks what comes out.

    Where the real Kustomize is installed, it must make the same of them.

    Raises:
        UserError: One of them does not render.
    """
    manifests = [manifest for folder in folders for manifest in kustomize.render(folder)]
    real = kustomize.installed()
    theirs = (
        [manifest for folder in folders for manifest in kustomize.render(folder, real)] if real else manifests
    )
    return [*_differences(manifests, theirs), *check(manifests)]


def _differences(ours: Sequence[Manifest], theirs: Sequence[Manifest]) -> list[Finding]:
    one, two = ({identity(manifest): manifest for manifest in each} for each in (ours, theirs))
    names = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    return [Finding("kustomize", f"{' '.join(name)} is not what kustomize makes of it") for name in names]
