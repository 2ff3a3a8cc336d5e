"""A run's episodes in a web browser, as they are played: `vz-ray view runs/x`.

In: a run directory and, for frames, its videos. Out: a local web server.
`columns`, `query` and `episode_view` are pure; `index` keeps what lists need in
SQLite; `follow` reads what the run appends; `server` and `access` speak HTTP;
`static/` is what the browser runs. Must not know how a run is made.
"""

from vz_ray.report.viewer.server import serve_viewer

__all__ = ["serve_viewer"]
