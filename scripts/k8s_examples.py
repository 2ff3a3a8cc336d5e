"""Write the rendered manifests in k8s/examples, and the alert rules as an object of the Prometheus operator.

python scripts/k8s_examples.py
"""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path

import yaml
from typer.testing import CliRunner

from vz_ray.cli import app

PROJECT = Path(__file__).resolve().parents[1]
K8S = PROJECT / "k8s"


def example_arguments() -> dict[str, list[str]]:
    """Return the arguments of each example."""
    listed = yaml.safe_load((K8S / "examples.yaml").read_text())
    return {name: shlex.split(text) for name, text in listed.items()}


def render_example(arguments: list[str]) -> str:
    """Return the output of `vz-ray k8s render`; its files are relative to the project."""
    with contextlib.chdir(PROJECT):
        result = CliRunner().invoke(app, ["k8s", "render", *arguments])
    if result.exception:
        raise result.exception
    return result.stdout


def prometheus_rule() -> str:
    """Return cluster/grafana/alerts.yaml as a PrometheusRule."""
    text = (PROJECT / "cluster" / "grafana" / "alerts.yaml").read_text()
    groups = text[text.index("groups:") :]
    header = (
        "# cluster/grafana/alerts.yaml for the Prometheus operator; `python scripts/k8s_examples.py` writes it.\n"
        "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\n"
        "metadata:\n  name: vz-ray\n  labels:\n    release: prometheus\nspec:\n"
    )
    return header + "".join(f"  {line}\n" if line else "\n" for line in groups.splitlines())


def main() -> None:
    """Write all files."""
    (K8S / "monitoring" / "rules.yaml").write_text(prometheus_rule())
    for name, arguments in example_arguments().items():
        (K8S / "examples" / f"{name}.yaml").write_text(render_example(arguments))


if __name__ == "__main__":
    main()
