"""Self-contained HTML reports of runs, and the episode viewer.

Input: a run directory and a frame source for thumbnails. Output: `report.html`, one file without network access.
Must not import training, rollout or learner code.
"""

from vz_ray.report.run_report import render_report, write_report

__all__ = ["render_report", "write_report"]
