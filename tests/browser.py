"""Checks of a web page in a browser (fixture `chromium`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ARTEFACTS = Path(__file__).resolve().parent.parent / "test-artefacts"
"""Directory of the screenshots."""
PHONE = {"width": 390, "height": 844}
Page = Any


def accessibility_violations(page: Page) -> list[str]:
    """Return the violations of accessibility rules that axe finds, each with the HTML of an element."""
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page).response["violations"]
    return [f"{violation['id']}: {violation['nodes'][0]['html']}" for violation in violations]


def fits_width(page: Page) -> bool:
    """Return False if the page scrolls horizontally."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def save_screenshot(page: Page, name: str) -> None:
    ARTEFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"{name}.png")
