"""torchvision imports with any torch build, and Python starts without importing either."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import vz_ray
from vz_ray.utils.torchvision_ops import PTH_LINE, TorchvisionFinder, write_pth

pytestmark = pytest.mark.integration

ROOT = Path(vz_ray.__file__).parent.parent


def run_python(code: str, *flags: str) -> str:
    result = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_torchvision_imports_in_a_fresh_process():
    assert run_python("import torchvision; print(torchvision.__version__)").startswith(
        importlib.metadata.version("torchvision").split("+")[0]
    )


def test_python_start_imports_neither_torch_nor_torchvision():
    modules = run_python(
        "import sys; print(sorted({'torch', 'torchvision', 'vz_ray.utils.torchvision_ops'} & set(sys.modules)))"
    )
    assert modules == "['vz_ray.utils.torchvision_ops']"


def test_find_spec_does_not_import_torch():
    statement = "import importlib.util, sys; importlib.util.find_spec('torchvision')"
    assert run_python(f"{statement}; print('torch' in sys.modules)") == "False"


FAKE = """
import sys
sys.path.insert(0, {root!r})
sys.path.insert(0, {fake!r})
from vz_ray.utils.torchvision_ops import install
install()
import torch
{before}
import torchvision
from vz_ray.utils import torchvision_ops
print(len(torchvision_ops._defined), hasattr(torch.ops.torchvision, "nms"))
"""


@pytest.fixture
def fake(tmp_path: Path):
    """Create a fake torchvision package that needs torchvision::nms on import."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("import torch\ntorch.ops.torchvision.nms\n")
    return package


def run_fake(fake: Path, before: str = "") -> str:
    return run_python(FAKE.format(root=str(ROOT), fake=str(fake.parent), before=before))


def test_schemas_are_defined_without_library(fake):
    assert run_fake(fake) == "1 True"


def test_schemas_are_defined_if_library_fails_to_load(fake):
    (fake / "_C.so").write_bytes(b"not a library")
    assert run_fake(fake) == "1 True"


def test_existing_operators_are_kept(fake):
    define = (
        "library = torch.library.Library('torchvision', 'DEF');"
        "library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')"
    )
    assert run_fake(fake, define) == "0 True"


def test_loadable_library_disables_the_hook(fake):
    """Any loadable library serves as torchvision's; only loading matters."""
    import torch

    library = next((Path(torch.__file__).parent / "lib").glob("libtorch_python.so"))
    (fake / "_C.so").symlink_to(library)
    (fake / "__init__.py").write_text("")
    assert run_fake(fake) == "0 False"


def test_other_modules_are_ignored():
    assert TorchvisionFinder().find_spec("torch") is None
    assert TorchvisionFinder().find_spec("torchvision.ops") is None


def test_pth_file_is_one_executable_line(tmp_path):
    path = write_pth(tmp_path)
    assert path.read_text() == PTH_LINE
    assert PTH_LINE.startswith("import ")
    assert PTH_LINE.count("\n") == 1


def test_pth_line_is_silent_without_vz_ray():
    assert run_python(f"import sys; sys.path = []\n{PTH_LINE}", "-S", "-I") == ""
