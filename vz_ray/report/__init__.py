"""A run as a web page.

In: a run directory and, for thumbnails, whoever can decode its videos. Out:
`report.html`, one file that needs no network. Must not know how a run is made:
what is not in the directory is not in the report.
"""

from vz_ray.report.run_report import render_report, write_report

__all__ = ["render_report", "write_report"]
