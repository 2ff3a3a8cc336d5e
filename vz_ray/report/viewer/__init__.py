"""Episode viewer: browse the episodes of a running or finished run with `vz-ray view runs/x`.

Input: a run directory and, for frames, its videos. Output: a local web server.
`episode_row`, `index_queries` and `episode_view` are pure. `episode_index` stores list columns in SQLite,
`log_follower` reads appended log lines, `server` and `access_control` handle HTTP, `static/` is the front end.
Must not import training, rollout or learner code.
"""

from vz_ray.report.viewer.server import serve_viewer

__all__ = ["serve_viewer"]
