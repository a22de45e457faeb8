"""Relative links and anchors of the pages lead somewhere."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.docs.markdown import PAGES, ROOT, anchors, links


def broken_links(text: str, page: Path) -> list[str]:
    """Returns the relative links of a page whose file or anchor does not exist."""
    broken = []
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve()
        exists = not path or (target.exists() and target.is_relative_to(ROOT))
        if not exists or (anchor and anchor not in anchors(target.read_text(encoding="utf-8") if path else text)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    assert broken_links(page.read_text(encoding="utf-8"), page) == []


@pytest.mark.parametrize(
    ("link", "works"),
    [
        ("data.md", True), ("data.md#downloading", True), ("#a-title-100-plain", True), ("#a-title-100-plain-1", True),
        ("https://example.org/nothing", True), ("images/demo.png", True), ("../configs", True),
        ("dato.md", False), ("data.md#uploading", False), ("#b-title", False), ("#a-title-100-plain-2", False),
        ("images/none.png", False), ("/etc", False),
    ],
)  # fmt: skip
def test_broken_links_are_found(link: str, works: bool) -> None:
    page = ROOT / "docs" / "page.md"
    text = (
        f"# A title: `100%`, plain\n\n| a |\n|---|\n| ![]({link}) |\n\n[x]({link}) `[y](z)`\n\n## A title 100 plain\n"
    )
    assert broken_links(text, page) == ([] if works else [link] * 2)
