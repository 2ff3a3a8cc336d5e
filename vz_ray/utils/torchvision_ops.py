"""Import hook that lets a torchvision built for CUDA run with a CPU build of torch.

On import, torchvision registers shape functions for its operators and fails if the operators are missing.
If its native library cannot be loaded (it links against CUDA and this torch has none), this module defines the
schemas of the two operators first. If the native operators load, it does nothing.

Every process that imports torchvision needs the hook, including children of vLLM and Ray. A `.pth` file in
site-packages imports this module when Python starts, so it imports only `sys` until torchvision is imported.
`scripts/install.sh` calls `write_pth()`, which writes that file.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from pathlib import Path
    from types import ModuleType

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
PTH_NAME = "vz_ray_torchvision.pth"
PTH_LINE = (
    'import sys; exec("try:\\n import vz_ray.utils.torchvision_ops as hook'
    '\\nexcept ImportError:\\n pass\\nelse:\\n hook.install()")\n'
)

_defined: list[object] = []  # garbage collection of a Library would remove its schemas


class TorchvisionFinder:
    """Meta path finder that wraps the loader of torchvision only."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name)
        loader = spec.loader if spec else None
        if spec is None or loader is None:
            return None
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            define_missing_ops(spec.origin)
            run(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Install the hook for the next import of torchvision in this process."""
    if not any(isinstance(finder, TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionFinder())


def define_missing_ops(origin: str | None) -> bool:
    """Define the schemas unless torchvision's native library loads; return True if they were defined.

    Args:
        origin: Path of torchvision's `__init__.py`.
    """
    import torch

    if torchvision_library_loads(origin) or hasattr(torch.ops.torchvision, "nms"):
        return False
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _defined.append(library)
    return True


def torchvision_library_loads(origin: str | None) -> bool:
    """Load the native library next to `origin`, as torchvision does; return True on success."""
    from pathlib import Path

    import torch

    for library in sorted(Path(origin or "").parent.glob("_C*.so")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return True
    return False


def write_pth(site_packages: Path | None = None) -> Path:
    """Write the `.pth` file that installs the hook at every start of Python; return its path."""
    import sysconfig
    from pathlib import Path

    path = (site_packages or Path(sysconfig.get_paths()["purelib"])) / PTH_NAME
    path.write_text(PTH_LINE)
    return path
