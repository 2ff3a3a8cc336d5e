"""Assets shared by the web pages of `serve` and `report`: base styles, episode timeline, frame strip.

In: nothing. Out: the text of an asset (`load_asset`). CSS and JavaScript modules, without a build step.
Must not import other packages.
"""

from __future__ import annotations

from importlib.resources import files


def load_asset(name: str) -> str:
    """Return the text of a shared file, such as `base.css`."""
    return files("vz_ray.web").joinpath(name).read_text(encoding="utf-8")
