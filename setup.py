"""Build steps that pyproject.toml cannot express: `conf/` and `assets/` are copied into the package of a wheel."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithResources(build_py):
    """Copies the files that `vz_ray.utils.resources` finds; an editable install uses the checkout instead."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for folder in ("conf", "assets"):
                shutil.copytree(folder, Path(self.build_lib) / "vz_ray" / folder, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithResources})
