"""Pages name only config keys that exist, their Python snippets run, and the index names every page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vz_ray.rewards.function_check import check_function, make_cases

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KEY = re.compile(r"(?<![\w./-])[a-z_]+(?:\.[a-z_]+)+(?=[=`:\s,)|]|$)")


def read_config_keys() -> tuple[set[str], set[str]]:
    """Return sections and dotted keys of the generated reference."""
    sections: set[str] = set()
    keys: set[str] = set()
    current: list[str] = []
    for line in (ROOT / "docs/config.md").read_text().splitlines():
        if heading := re.match(r"### (`.*)", line):
            current = [name.replace("<name>", "x") for name in re.findall(r"`([\w.<>]+)`", heading[1])]
            sections.update(current)
        elif row := re.match(r"\| `(\w+)`", line):
            keys.update(f"{section}.{row[1]}" for section in current)
    return sections, keys


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_existing_config_keys(page: Path):
    sections, keys = read_config_keys()
    roots = {section.split(".")[0] for section in sections} - {"benchmarks"}
    assert len(keys) > 200
    unknown = {
        name
        for name in KEY.findall(page.read_text())
        if name.split(".")[0] in roots
        and name not in keys | sections
        and not re.search(r"\.(py|md|yaml|json|jsonl|html|csv)$", name)
    }
    assert not unknown


def test_index_links_every_page():
    index = (ROOT / "docs/index.md").read_text()
    missing = [page.name for page in PAGES[1:] if page.name != "index.md" and f"({page.name})" not in index]
    assert not missing


SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if SNIPPET.search(page.read_text())], ids=lambda page: page.name
)
def test_python_snippets_define_all_names(page: Path, tmp_path: Path):
    for number, snippet in enumerate(SNIPPET.findall(page.read_text())):
        (tmp_path / f"snippet_{number}.py").write_text(snippet)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E9,F", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_reward_example_keeps_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (example,) = SNIPPET.findall((ROOT / "docs/rewards.md").read_text())
    (tmp_path / "my_rewards.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    trials = check_function("my_rewards:concise")
    assert [trial.violation for trial in trials] == [""] * len(make_cases())
    assert {trial.parts.extra.get("concise") for trial in trials if trial.parts and trial.parts.valid} == {0.0, 0.1}
