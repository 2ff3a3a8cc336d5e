"""Code fingerprint: content, digest and comparison."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest

import vz_ray
from vz_ray.utils.code_fingerprint import check_same_code, code_fingerprint, source_digest
from vz_ray.utils.errors import UserError


def test_fingerprint_has_sources_and_package_versions() -> None:
    versions = code_fingerprint()
    sources = source_digest(Path(vz_ray.__file__).parent)
    assert versions["vz_ray"] == f"{vz_ray.__version__} (sources {sources})"
    assert versions["ray"] == version("ray")
    assert set(versions) == {"vz_ray", "ray", "torch", "transformers", "vllm"}
    assert "+" not in versions["torch"]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "package").mkdir()
    (tmp_path / "package/one.py").write_text("x = 1\n")
    (tmp_path / "two.py").write_text("y = 2\n")
    return tmp_path


def test_digest_changes_with_sources_only(package: Path) -> None:
    original = source_digest(package)
    assert re.fullmatch(r"[0-9a-f]{8}", original)
    (package / "notes.txt").write_text("not code")
    (package / "package/__pycache__").mkdir()
    (package / "package/__pycache__/one.pyc").write_bytes(b"compiled")
    assert source_digest(package) == original
    (package / "two.py").write_text("y = 3\n")
    changed = source_digest(package)
    (package / "two.py").rename(package / "three.py")
    assert len({original, changed, source_digest(package)}) == 3


def test_same_code_passes_and_missing_packages_are_ignored() -> None:
    check_same_code(code_fingerprint(), "rollout-0", "10.0.0.7")
    check_same_code({"vz_ray": code_fingerprint()["vz_ray"], "flash": "2.0"}, "rollout-0", "10.0.0.7")


def test_other_version_raises_with_versions_and_fix() -> None:
    driver = code_fingerprint() | {"vz_ray": "9.9.9 (sources 0123abcd)", "torch": "1.0.0"}
    with pytest.raises(UserError) as raised:
        check_same_code(driver, "rollout-0", "10.0.0.7")
    message = str(raised.value)
    assert message.startswith("rollout-0 on node 10.0.0.7 runs another version of the code: ")
    assert f"vz_ray {code_fingerprint()['vz_ray']} there, 9.9.9 (sources 0123abcd) in the driver" in message
    assert f"torch {code_fingerprint()['torch']} there, 1.0.0 in the driver" in message
    assert "ray 2" not in message.replace("vz_ray", "")
    assert "same image" in message
    assert "runtime_env" in message
