"""What pages for a browser share: colours and type, the timeline of an episode, strips of frames.

Files that a browser reads as they are (no build step), and where they lie.
In: nothing. Out: `load_asset(name)`. Knows no other room; pages themselves belong to
the room whose data they show.
"""

from __future__ import annotations

from importlib.resources import files


def load_asset(name: str) -> str:
    """Return the text of a shared file, such as `base.css`."""
    return files("vz_ray.web").joinpath(name).read_text(encoding="utf-8")
