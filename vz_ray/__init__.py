"""vz_ray trains, evaluates and serves a zooming long-video agent on Ray."""

__version__ = "0.1.0"
