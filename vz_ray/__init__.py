"""Train, evaluate and serve video agents that zoom, on Ray. The Python API is documented in `vz_ray.api`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vz_ray.api import (
        Checkpoint,
        VideoAgent,
        episode_rows,
        load_checkpoint,
        load_config,
        read_episodes,
        read_metrics,
    )

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "VideoAgent",
    "episode_rows",
    "load_checkpoint",
    "load_config",
    "read_episodes",
    "read_metrics",
]


def __getattr__(name: str) -> Any:
    """Import the API on first use, so that `import vz_ray` stays fast."""
    if name in __all__:
        from vz_ray import api

        return getattr(api, name)
    raise AttributeError(f"module 'vz_ray' has no attribute {name!r}")
