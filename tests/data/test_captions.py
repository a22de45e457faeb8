"""Compares cleaned captions with those of the public release."""

import html
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ftfy
import pytest

from micro_dit.data import captions
from micro_dit.data.captions import clean_caption, clean_caption_once
from micro_dit.errors import UserError

PAIRS = json.loads((Path(__file__).parents[1] / "golden" / "captions.json").read_text(encoding="utf-8"))["pairs"]


def test_golden_pairs() -> None:
    assert len(PAIRS) >= 30
    wrong = [pair for pair in PAIRS if clean_caption_once(pair["input"]) != pair["once"]]
    wrong += [pair for pair in PAIRS if clean_caption(pair["input"]) != pair["output"]]
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("", ""),
        (" \t\n", ""),
        ("A “Cat” &amp; a Dog", 'a "cat" a dog'),
        ("photo.jpg", ""),
        ("ﬁve ｃａｔｓ", "five cats"),
    ],
)
def test_unusual_captions(text: str, cleaned: str) -> None:
    assert clean_caption(text) == cleaned


@pytest.mark.parametrize("text", ["<![unknown[ ]]> a cat", "<![if gte mso 9]> a cat", "\ud83d & <b>a cat</b>"])
def test_markup_that_the_parser_rejects(text: str) -> None:
    assert "a cat" in clean_caption(text)
    clean_caption(text).encode()


def test_encoding_repair_is_skipped_only_if_it_changes_nothing() -> None:
    """For plain ASCII, neither the repair nor unescaping may change the output of the rules."""
    generator = random.Random(0)
    plain = [chr(code) for code in range(32, 127)]
    pieces = [*plain, "&amp;", "&quot;", "&#65;", "&lt", "&amp;amp;", "<b>", " "]
    for _ in range(500):
        text = captions._apply(captions.REMAINS, "".join(generator.choices(pieces, k=40)))
        assert html.unescape(ftfy.fix_text(text)) == text


def test_every_rule_is_used() -> None:
    """Every rule matches some caption and documents its reason."""
    text = (
        '<person> http://a.com www:/b @user 漢字 – “a” ‘b’ &quot; &amp 1.2.3.4 \\n #1 #12345 1234567 a.jpg "" .. *** . '
        "jc6640 jc6640vc 6640vc231 free shipping free download click for it png images page 3 j2d1a2a 1x2 a : b,c  d"
    )
    edges = ["at 10:34 ", '"all"', "-a", "a-", ".a"]
    for rule in (*captions.ADDRESSES, *captions.REMAINS, *captions.LEFTOVERS):
        assert any(rule.pattern.search(sample) for sample in (text, *edges)), rule
        assert rule.why


@pytest.mark.parametrize(
    ("package", "load", "pip_name"),
    [("bs4", captions._markup_parser, "beautifulsoup4"), ("ftfy", captions._encoding_repairer, "ftfy")],
)
def test_missing_package(monkeypatch: pytest.MonkeyPatch, package: str, load: Callable[[], Any], pip_name: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {pip_name}"):
        load.__wrapped__()
