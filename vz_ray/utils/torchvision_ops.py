"""Lets a torchvision built for CUDA be imported beside a CPU build of torch.

torchvision registers shape functions for its operators when it is imported,
and fails if the operators do not exist. Where its own library cannot be
loaded (it is linked against CUDA, and this torch is not), the schemas of the
two operators are defined here first; its Python parts then work. Where its
own operators load, nothing is done.

This must happen in every process that imports torchvision, the engine's and
Ray's children too. So a `.pth` file in site-packages imports this module when
Python starts: it imports nothing but `sys` until torchvision is imported.

`write_pth()` writes that file; `scripts/install.sh` calls it.
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

_defined: list[object] = []  # a Library that is collected takes its schemas with it


class TorchvisionFinder:
    """Wraps the loader of torchvision, and of nothing else."""

    def find_spec(
        self, name: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
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
    """Makes sure that the next import of torchvision in this process is prepared."""
    if not any(isinstance(finder, TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionFinder())


def define_missing_ops(origin: str | None) -> bool:
    """Defines the schemas unless torchvision's own library loads; True if it did define them.

    `origin` is the path of torchvision's `__init__.py`.
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
    """Loads the library beside `origin` the way torchvision itself is about to."""
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
    """Writes the `.pth` file that installs the hook whenever this Python starts; returns its path."""
    import sysconfig
    from pathlib import Path

    path = (site_packages or Path(sysconfig.get_paths()["purelib"])) / PTH_NAME
    path.write_text(PTH_LINE)
    return path
