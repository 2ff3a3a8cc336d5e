"""Dockerfiles of this project, held to rules of its own: they cannot be built everywhere, and can be read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from cluster.manifests.rules.ray import locked_ray
from cluster.manifests.schema import ROOT

FOLDER = ROOT / "cluster" / "docker"
INSTRUCTIONS = (
    "ARG",
    "FROM",
    "SHELL",
    "USER",
    "RUN",
    "WORKDIR",
    "ENV",
    "COPY",
    "CMD",
    "ENTRYPOINT",
    "EXPOSE",
    "LABEL",
)
"""Those that are needed; ADD, which fetches and unpacks, is not."""
SECRET = re.compile(r"(?:token|passw|secret|api_?key|credential)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, its continued lines joined.

    Attributes:
        name: Such as `RUN_METADATA_KEY`.
        value: What follows.
        line: Where it begins, from 1.
    """

    name: str
    value: str
    line: int

    def words(self) -> list[str]:
        return shlex.split(self.value)


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """An image's recipe.

    Attributes:
        name: Of the file, for messages.
        instructions: In order.
    """

    name: str
    instructions: Sequence[Instruction]

    def of(self, name: str) -> list[Instruction]:
        return [instruction for instruction in self.instructions if instruction.name == name]

    def copied(self) -> list[tuple[Instruction, str]]:
        """Every path that is copied from the context."""
        return [
            (copy, word)
            for copy in self.of("COPY")
            for word in [word for word in copy.words() if not word.startswith("--")][:-1]
        ]


def parse(name: str, text: str) -> Dockerfile:
    """Reads a Dockerfile: comments left out, continued lines joined.

    Example: `parse("a", "FROM b\\nRUN c \\\\\\n  d").instructions[1].value` -> `"c   d"`
    """
    found, pending, begun = [], "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or (not pending and not line.strip()):
            continue
        begun = begun or number
        if line.rstrip().endswith("\\"):
            pending += line.rstrip()[:-1] + " "
            continue
        instruction, _, value = (pending + line).strip().partition(" ")
        found.append(Instruction(instruction.upper(), value.strip(), begun))
        pending, begun = "", 0
    return Dockerfile(name, found)


def check_dockerfiles(folder: Path = FOLDER) -> list[str]:
    """What is wrong with the Dockerfiles of a folder."""
    files = [parse(path.name, path.read_text()) for path in sorted(folder.glob("*.Dockerfile"))]
    return [f"[{name}] {fault}" for file in files for name, rule in RULES.items() for fault in rule(file)]


def known_instructions(file: Dockerfile) -> Iterator[str]:
    """Only instructions that are needed."""
    for instruction in file.instructions:
        if instruction.name not in INSTRUCTIONS:
            yield (
                f"{file.name}:{instruction.line}: {instruction.name} is not one of "
                f"{', '.join(INSTRUCTIONS)}; use those"
            )


def base_is_pinned(file: Dockerfile) -> Iterator[str]:
    """The base is Ray's image of the locked Ray, with Python and platform named."""
    wanted = rf"rayproject/ray:{re.escape(locked_ray())}-py311-(cpu|cu[0-9]{{3}})(@sha256:[0-9a-f]{{64}})?"
    for base in file.of("FROM"):
        if not re.fullmatch(wanted, base.value):
            yield (
                f"{file.name}:{base.line}: the base is {base.value}; it must be "
                f"rayproject/ray:{locked_ray()}-py311- "
                "and cpu or a CUDA version, as requirements/cpu.lock and the other image have them"
            )


def ends_without_root(file: Dockerfile) -> Iterator[str]:
    """The last user is 1000, by number, as in the manifests; what is installed is installed by it."""
    users = file.of("USER")
    if not users or users[-1].value != "1000:100":
        yield (
            f"{file.name}: the last USER is {users[-1].value if users else 'the base image’s'}; end with "
            "1000:100"
        )
    root = False
    for instruction in file.instructions:
        if instruction.name == "USER":
            root = instruction.value.split(":")[0] in ("root", "0")
        elif root and instruction.name == "RUN" and "pip install" in instruction.value:
            yield f"{file.name}:{instruction.line}: pip runs as root; put it after USER 1000:100"


def holds_no_secrets(file: Dockerfile) -> Iterator[str]:
    """No ARG or ENV is named like a secret: both stay readable in the image."""
    for instruction in [*file.of("ARG"), *file.of("ENV")]:
        for name in re.findall(r"(\w+)(?==)|^(\w+)$", instruction.value):
            if SECRET.search("".join(name)):
                yield (
                    f"{file.name}:{instruction.line}: {''.join(name)} stays in the image; use RUN "
                    "--mount=type=secret"
                )


def installs_what_is_locked(file: Dockerfile) -> Iterator[str]:
    """pip installs from a lock, or with one as its constraint, and caches nothing."""
    if "PIP_NO_CACHE_DIR=1" not in " ".join(env.value for env in file.of("ENV")):
        yield f"{file.name}: pip's cache stays in the image; set ENV PIP_NO_CACHE_DIR=1"
    for run in file.of("RUN"):
        for command in re.split(r"&&|;|\|", run.value):
            if "pip install" in command and not re.search(r"--no-deps|--constraint", command):
                yield (
                    f"{file.name}:{run.line}: `{' '.join(command.split())}` takes whatever is newest; "
                    "add --no-deps with a lock, or --constraint with one"
                )


def runs_nothing_fetched(file: Dockerfile) -> Iterator[str]:
    """Nothing is piped from the network into a shell, and apt leaves no lists."""
    for run in file.of("RUN"):
        if re.search(r"(curl|wget)[^&;]*\|\s*(ba)?sh", run.value):
            yield f"{file.name}:{run.line}: it runs what it fetches; install a pinned package"
        if "apt-get install" in run.value and (
            "--no-install-recommends" not in run.value or "rm -rf /var/lib/apt/lists" not in run.value
        ):
            yield (
                f"{file.name}:{run.line}: apt-get needs --no-install-recommends, and rm -rf "
                "/var/lib/apt/lists after it"
            )


def copies_what_is_there(file: Dockerfile) -> Iterator[str]:
    """What is copied exists, is let through by .dockerignore, and belongs to the image's user."""
    patterns = (ROOT / ".dockerignore").read_text().split("\n")
    admitted = [line[1:] for line in patterns if line.startswith("!")]
    if next((line for line in patterns if line and not line.startswith("#")), "") != "*":
        yield ".dockerignore: its first pattern must be *, so that only what is named is sent to the builder"
    for copy, path in file.copied():
        if not (ROOT / path).exists():
            yield f"{file.name}:{copy.line}: there is no {path} here; correct the path"
        elif not any(fnmatch(path, pattern) for pattern in admitted):
            yield f"{file.name}:{copy.line}: .dockerignore keeps {path} out; add !{path} there"
        if "--chown=1000:100" not in copy.words():
            yield f"{file.name}:{copy.line}: {path} would belong to root; add --chown=1000:100"


def is_compiled(file: Dockerfile) -> Iterator[str]:
    """Bytecode is made at build time: a read-only image cannot keep it later."""
    text = " ".join(run.value for run in file.of("RUN"))
    if "compileall" not in text or "--no-compile" in text:
        yield (
            f"{file.name}: nothing compiles vz_ray; run python -m compileall -q vz_ray cluster, and pip "
            "without --no-compile"
        )
    for env in file.of("ENV"):
        if re.search(r"PYTHONDONTWRITEBYTECODE=[^\s]", env.value):
            yield (
                f"{file.name}:{env.line}: PYTHONDONTWRITEBYTECODE keeps bytecode from being written; remove "
                "it"
            )


RULES: dict[str, Callable[[Dockerfile], Iterator[str]]] = {
    rule.__name__.replace("_", "-"): rule
    for rule in (
        known_instructions,
        base_is_pinned,
        ends_without_root,
        holds_no_secrets,
        installs_what_is_locked,
        runs_nothing_fetched,
        copies_what_is_there,
        is_compiled,
    )
}
"""All rules by name."""
