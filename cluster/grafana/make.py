"""Writes the dashboards beside this file: `python -m cluster.grafana.make`.

`$run` is a variable of every dashboard about runs, `$datasource` of all of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.grafana.of_clusters import NODES, SERVING
from cluster.grafana.of_runs import FLEET, TRAINING
from cluster.grafana.panel import Panel

HERE = Path(__file__).resolve().parent
COLUMNS, WIDTH, HEIGHT = 24, 8, 8
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

DASHBOARDS = {
    "training": ("vz_ray training", TRAINING, True),
    "rollout-and-decode": ("vz_ray fleet and clips", FLEET, True),
    "serving": ("vz_ray serving", SERVING, False),
    "ray-nodes": ("vz_ray nodes of Ray", NODES, False),
}


def panel(number: int, spec: Panel) -> dict[str, Any]:
    """Grafana's object for a panel."""
    across = COLUMNS // WIDTH
    targets = [
        {"refId": chr(ord("A") + at), "expr": query, "legendFormat": legend, "datasource": DATASOURCE}
        for at, (legend, query) in enumerate(spec.queries)
    ]
    return {
        "id": number + 1,
        "type": spec.kind,
        "title": spec.title,
        "description": spec.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": number % across * WIDTH, "y": number // across * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": spec.unit}, "overrides": []},
        "options": {"textMode": "value_and_name"} if spec.kind == "stat" else {},
        "targets": targets,
    }


def variables(of_runs: bool) -> list[dict[str, Any]]:
    """What a reader chooses: the data source, and runs."""
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    run = {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": "label_values(ray_vz_iteration, run)", "refId": "run"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }
    return [source, run] if of_runs else [source]


def dashboard(name: str, title: str, panels: Sequence[Panel], of_runs: bool) -> dict[str, Any]:
    """Grafana's object for a dashboard."""
    return {
        "uid": f"vz-ray-{name}",
        "title": title,
        "tags": ["vz_ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": variables(of_runs)},
        "panels": [panel(number, spec) for number, spec in enumerate(panels)],
    }


def main() -> None:
    for name, (title, panels, of_runs) in DASHBOARDS.items():
        text = json.dumps(dashboard(name, title, panels, of_runs), indent=1, ensure_ascii=False)
        (HERE / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
