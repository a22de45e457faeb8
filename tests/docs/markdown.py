"""Reads Markdown pages: their links, anchors and code."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = sorted([
    *ROOT.glob("*.md"), *ROOT.glob(".github/*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/api/*.md"),
    ROOT / "benchmarks" / "RESULTS.md",
])  # fmt: skip
SHELL = ("", "sh", "bash", "shell", "console")


def tokens(text: str) -> Iterator[Token]:
    """Yields all tokens of a page, those inside paragraphs included."""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        yield token
        yield from token.children or ()


def links(text: str) -> list[str]:
    """Returns the targets of links and images."""
    found = (token.attrGet("href") or token.attrGet("src") for token in tokens(text))
    return [str(target) for target in found if target]


def anchors(text: str) -> set[str]:
    """Returns the anchors that GitHub derives from the headings."""
    found: list[str] = []
    parsed = list(MarkdownIt("commonmark").enable("table").parse(text))
    for opening, heading in itertools.pairwise(parsed):
        if opening.type == "heading_open":
            title = "".join(child.content for child in heading.children or ())
            slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            repeated = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
            found.append(f"{slug}-{repeated}" if repeated else slug)
    return set(found)


def code(text: str) -> Iterator[str]:
    """Yields code spans, and the lines of code blocks that hold shell commands; continued lines are joined."""
    for token in tokens(text):
        if token.type == "code_inline":
            yield token.content
        elif token.type == "code_block" or (token.type == "fence" and token.info.strip() in SHELL):
            yield from re.sub(r"\\\n\s*", "", token.content).splitlines()


def python_code(text: str) -> list[str]:
    """Returns the blocks of Python code."""
    return [token.content for token in tokens(text) if token.type == "fence" and token.info.strip() == "python"]
