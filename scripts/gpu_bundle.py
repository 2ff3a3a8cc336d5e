"""Build `dist/gpu-bundle.tar.xz`: vLLM, DeepSpeed and pytest for a machine that has torch and transformers only.

    python scripts/gpu_bundle.py                # one Hopper GPU; five minutes, 2 GB of temporary disk
    python scripts/gpu_bundle.py --arch 80      # an A100

The machine needs x86-64 Linux, Python 3.12, torch 2.11 or newer with CUDA 13, transformers and peft, but no network.
Packages come from pip's configured index at the versions of requirements/*.lock. vLLM's extensions use torch's stable
ABI, so they load under another version of torch. To keep the bundle small, the kernels of other GPU architectures are
cleared, and extensions that Qwen-VL models do not need are left out; Ray and PyAV are not included.
`scripts/gpu_check.sh` unpacks the bundle and runs the checks.
"""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = "3.12"
PLATFORMS = [
    *(f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 26, 24, 17, 5)),
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]
PACKAGES = [
    "annotated-types", "apache-tvm-ffi", "astor", "blake3", "cachetools", "cbor2", "compressed-tensors", "depyf",
    "dill", "fastapi", "hjson", "httpcore2", "httpx2", "ijson", "iniconfig", "jiter", "jsonschema",
    "jsonschema-specifications", "lark", "llguidance", "msgspec", "omegaconf", "openai", "oss-harmony",
    "partial-json-parser", "pluggy", "psutil", "pybase64", "pydantic", "pydantic-core", "pygments", "pytest",
    "pytest-asyncio", "pytest-timeout", "python-json-logger", "pyzmq", "referencing", "rpds-py", "setproctitle",
    "sniffio", "starlette", "truststore", "typing-inspection", "vllm", "xgrammar", "xxhash",
]  # fmt: skip
"""Wheels: what vLLM, DeepSpeed and the tests import beyond the dependencies of torch, transformers and peft."""
SOURCES = ["deepspeed"]
"""Packages without a wheel whose Python files are enough."""
EXTENSIONS = ["vllm/_C_stable_libtorch.abi3.so", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"]
"""vLLM's extensions for Qwen-VL models in half precision on Hopper GPUs; the others are left out."""
UNUSED = [
    "vllm/vllm-rs",
    "vllm/third_party/fmha_sm100",
    "vllm/third_party/deep_gemm",
    "vllm/third_party/flashmla",
    "vllm/entrypoints/serve/instrumentator/static",
]

FATBIN_SECTION = b".nv_fatbin"
FATBIN_MAGIC = 0xBA55ED50


def read_pins() -> dict[str, str]:
    """Return the locked version of each package."""
    text = "".join((ROOT / "requirements" / name).read_text() for name in ("gpu.lock", "dev.lock"))
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, flags=re.MULTILINE))


def download(requirements: list[str], directory: Path, *, wheels: bool) -> None:
    """Download packages without their dependencies from pip's configured index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory)]
    if wheels:
        command += ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
        command += [f"--abi={abi}" for abi in ("cp312", "abi3", "none")]
        command += [f"--platform={platform}" for platform in PLATFORMS]
    else:
        command += ["--no-binary=:all:"]
    if subprocess.run([*command, *requirements], check=False).returncode:
        sys.exit(f"gpu_bundle: pip could not download {', '.join(requirements)}; the lines above say why")


def unpack(downloads: Path, site: Path) -> None:
    """Unpack all wheels, and the packages of source archives, into `site`."""
    for wheel in sorted(downloads.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    for source in sorted(downloads.glob("*.tar.gz")):
        name = source.name.split("-")[0]
        with tarfile.open(source) as archive:
            prefix = f"{source.name.removesuffix('.tar.gz')}/"
            members = [m for m in archive.getmembers() if m.name.startswith(f"{prefix}{name}/")]
            for member in members:
                member.name = member.name.removeprefix(prefix)
            archive.extractall(site, members=members, filter="data")


def find_section(data: bytes, name: bytes) -> tuple[int, int]:
    """Return offset and size of a section of a 64-bit ELF file.

    Raises:
        ValueError: The file has no such section.
    """
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry_size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * entry_size) for i in range(count)]
    names = headers[names_index][4]
    for name_offset, _, _, _, offset, size in headers:
        start = names + name_offset
        if data[start : data.index(b"\0", start)] == name:
            return offset, size
    raise ValueError(f"no section {name.decode()}")


def fatbin_entries(data: bytes, offset: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Yield architecture, offset and size of the code of each kernel image in a section of fat binaries."""
    position, end = offset, offset + size
    while position < end - 16:
        magic, _, header_size, fatbin_size = struct.unpack_from("<IHHQ", data, position)
        if magic != FATBIN_MAGIC:
            position += 8  # padding between fat binaries
            continue
        entry, position = position + header_size, position + header_size + fatbin_size
        while entry < position:
            (entry_header_size,) = struct.unpack_from("<I", data, entry + 4)
            (code_size,) = struct.unpack_from("<Q", data, entry + 8)
            (arch,) = struct.unpack_from("<I", data, entry + 28)
            yield arch, entry + entry_header_size, code_size
            entry += entry_header_size + code_size


def clear_other_kernels(library: Path, arch: int) -> None:
    """Overwrite the kernels of other architectures with zeros, which compress to nothing.

    Raises:
        ValueError: The library has no kernels for `arch`.
    """
    data = bytearray(library.read_bytes())
    entries = list(fatbin_entries(data, *find_section(data, FATBIN_SECTION)))
    if not any(entry_arch == arch for entry_arch, _, _ in entries):
        found = sorted({entry_arch for entry_arch, _, _ in entries})
        raise ValueError(f"{library.name} has kernels for {found}, none for {arch}")
    for entry_arch, offset, size in entries:
        if entry_arch != arch:
            data[offset : offset + size] = bytes(size)
    library.write_bytes(data)


def shrink(site: Path, arch: int) -> None:
    """Remove what the checks do not need."""
    for library in site.glob("vllm/**/*.so"):
        if str(library.relative_to(site)) not in EXTENSIONS:
            library.unlink()
    for name in EXTENSIONS:
        clear_other_kernels(site / name, arch)
    for name in UNUSED:
        path = site / name
        for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
            file.unlink()


def write_entry_points(site: Path) -> None:
    """Write the metadata of an installed vz_ray, from which vLLM finds its plugin."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    directory = site / f"vz_ray-{project['version']}.dist-info"
    directory.mkdir()
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vz_ray\nVersion: {project['version']}\n")
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()))
    ]
    (directory / "entry_points.txt").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability without the dot")
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "gpu-bundle.tar.xz")
    args = parser.parse_args()
    pins = read_pins()
    with tempfile.TemporaryDirectory() as folder:
        downloads, site = Path(folder, "downloads"), Path(folder, "site")
        download([f"{name}=={pins[name]}" for name in PACKAGES], downloads, wheels=True)
        download([f"{name}=={pins[name]}" for name in SOURCES], downloads, wheels=False)
        unpack(downloads, site)
        shrink(site, args.arch)
        write_entry_points(site)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(args.out, "w:xz", preset=6) as archive:
            archive.add(site, arcname="site", filter=lambda m: None if "__pycache__" in m.name else m)
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
