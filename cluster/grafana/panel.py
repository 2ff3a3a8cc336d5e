"""A panel of a dashboard, and queries as panels have them."""

from __future__ import annotations

from dataclasses import dataclass

WINDOW = "$__rate_interval"


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title, description: What a reader sees.
        unit: Grafana's name of it: `s`, `bytes`, `percentunit`, `short`, ...
        queries: Legend and PromQL of each line.
        kind: `timeseries` or `stat`.
    """

    title: str
    unit: str
    description: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"


def one(metric: str, by: str = "run") -> str:
    """A gauge of a run; its highest where several drivers told it, as a resumed run's do for a while."""
    return f'max by ({by}) ({metric}{{run=~"$run"}})'


def rate(metric: str, by: str = "run") -> str:
    """A counter's growth a second."""
    return f'sum by ({by}) (rate({metric}{{run=~"$run"}}[{WINDOW}]))'


def quantile(share: float, metric: str, by: str = "", where: str = 'run=~"$run"') -> str:
    """Of a histogram."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket{{{where}}}[{WINDOW}])))"


def gauge(title: str, unit: str, metric: str, description: str) -> Panel:
    return Panel(title, unit, description, (("{{run}}", one(metric)),))


def plain(title: str, unit: str, description: str, *queries: tuple[str, str]) -> Panel:
    return Panel(title, unit, description, queries)


def served(share: float, metric: str) -> str:
    return f"histogram_quantile({share}, sum by (le) (rate({metric}_bucket[{WINDOW}])))"
