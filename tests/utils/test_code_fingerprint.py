"""Which code runs where: what is compared, and what a refusal says."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest

import vz_ray
from vz_ray.utils.code_fingerprint import check_same_code, code_fingerprint, source_digest
from vz_ray.utils.errors import UserError


def test_a_fingerprint_names_our_version_and_sources_and_the_packages_that_matter() -> None:
    found = code_fingerprint()
    sources = source_digest(Path(vz_ray.__file__).parent)
    assert found["vz_ray"] == f"{vz_ray.__version__} (sources {sources})"
    assert found["ray"] == version("ray")
    assert set(found) == {"vz_ray", "ray", "torch", "transformers", "vllm"}
    assert "+" not in found["torch"]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "room").mkdir()
    (tmp_path / "room/one.py").write_text("x = 1\n")
    (tmp_path / "two.py").write_text("y = 2\n")
    return tmp_path


def test_any_change_of_a_source_changes_the_digest_and_nothing_else_does(package: Path) -> None:
    before = source_digest(package)
    assert re.fullmatch(r"[0-9a-f]{8}", before)
    (package / "notes.txt").write_text("not code")
    (package / "room/__pycache__").mkdir()
    (package / "room/__pycache__/one.pyc").write_bytes(b"compiled")
    assert source_digest(package) == before
    (package / "two.py").write_text("y = 3\n")
    changed = source_digest(package)
    (package / "two.py").rename(package / "three.py")
    assert len({before, changed, source_digest(package)}) == 3


def test_the_same_code_is_let_in_and_a_package_that_one_lacks_is_not_compared() -> None:
    check_same_code(code_fingerprint(), "rollout-0", "10.0.0.7")
    check_same_code({"vz_ray": code_fingerprint()["vz_ray"], "flash": "2.0"}, "rollout-0", "10.0.0.7")


def test_another_version_is_refused_with_both_versions_the_node_and_the_way_out() -> None:
    driver = code_fingerprint() | {"vz_ray": "9.9.9 (sources 0123abcd)", "torch": "1.0.0"}
    with pytest.raises(UserError) as refused:
        check_same_code(driver, "rollout-0", "10.0.0.7")
    said = str(refused.value)
    assert said.startswith("rollout-0 on node 10.0.0.7 runs another version of the code: ")
    assert f"vz_ray {code_fingerprint()['vz_ray']} there, 9.9.9 (sources 0123abcd) in the driver" in said
    assert f"torch {code_fingerprint()['torch']} there, 1.0.0 in the driver" in said
    assert "ray 2" not in said.replace("vz_ray", "")
    assert "the same image" in said
    assert "runtime_env" in said
