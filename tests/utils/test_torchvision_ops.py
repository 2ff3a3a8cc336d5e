"""torchvision is importable beside any torch, and starting Python stays cheap."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import vz_ray
from vz_ray.utils.torchvision_ops import PTH_LINE, TorchvisionFinder, write_pth

ROOT = Path(vz_ray.__file__).parent.parent


def python(code: str, *flags: str) -> str:
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torchvision_imports_in_a_fresh_process():
    assert python("import torchvision; print(torchvision.__version__)").startswith(
        importlib.metadata.version("torchvision").split("+")[0]
    )


def test_starting_python_imports_neither_torch_nor_torchvision():
    found = python(
        "import sys; print(sorted({'torch', 'torchvision', 'vz_ray.utils.torchvision_ops'} & set(sys.modules)))"
    )
    assert found == "['vz_ray.utils.torchvision_ops']"


def test_looking_for_torchvision_does_not_import_torch():
    look = "import importlib.util, sys; importlib.util.find_spec('torchvision')"
    assert python(f"{look}; print('torch' in sys.modules)") == "False"


FAKE = """
import sys
sys.path.insert(0, {root!r})
sys.path.insert(0, {fake!r})
from vz_ray.utils.torchvision_ops import install
install()
import torch
{before}
import torchvision
from vz_ray import torchvision_ops
print(len(torchvision_ops._defined), hasattr(torch.ops.torchvision, "nms"))
"""


@pytest.fixture
def fake(tmp_path: Path):
    """A package named torchvision that does what the real one does on import: needs torchvision::nms."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("import torch\ntorch.ops.torchvision.nms\n")
    return package


def run_fake(fake: Path, before: str = "") -> str:
    return python(FAKE.format(root=str(ROOT), fake=str(fake.parent), before=before))


def test_schemas_are_defined_where_there_is_no_library(fake):
    assert run_fake(fake) == "1 True"


def test_schemas_are_defined_where_the_library_does_not_load(fake):
    (fake / "_C.so").write_bytes(b"not a library")
    assert run_fake(fake) == "1 True"


def test_nothing_is_done_where_the_operators_exist(fake):
    define = (
        "library = torch.library.Library('torchvision', 'DEF');"
        "library.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')"
    )
    assert run_fake(fake, define) == "0 True"


def test_nothing_is_done_where_the_own_library_loads(fake):
    """Any loadable library stands for torchvision's; loading one is what decides."""
    import torch

    library = next((Path(torch.__file__).parent / "lib").glob("libtorch_python.so"))
    (fake / "_C.so").symlink_to(library)
    (fake / "__init__.py").write_text("")
    assert run_fake(fake) == "0 False"


def test_other_modules_are_left_alone():
    assert TorchvisionFinder().find_spec("torch") is None
    assert TorchvisionFinder().find_spec("torchvision.ops") is None


def test_the_pth_file_is_one_line_that_python_runs(tmp_path):
    path = write_pth(tmp_path)
    assert path.read_text() == PTH_LINE
    assert PTH_LINE.startswith("import ")
    assert PTH_LINE.count("\n") == 1


def test_the_pth_line_is_silent_where_vz_ray_is_gone():
    assert python(f"import sys; sys.path = []\n{PTH_LINE}", "-S", "-I") == ""
