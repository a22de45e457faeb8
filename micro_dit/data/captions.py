"""Cleans captions that were collected from the web with the rules of DeepFloyd-IF, applied twice.

The rules come from https://github.com/deep-floyd/IF. The public release cleaned its training captions with them. They
are kept unchanged, including the odd ones ('3.5x4.5' becomes '3.. 5'), because prompts at sampling time must be cleaned
in the same way as the training captions. The order matters: each rule is applied to the output of the previous one.
"""

import functools
import html
import re
import urllib.parse
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

from micro_dit.errors import UserError

CLEANING_VERSION = "deepfloyd-2"  # the DeepFloyd-IF rules, applied twice

FILE_TYPE = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
SITE = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"  # excludes user names of e-mail addresses
DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63"
    "\uff0d"
)


class Rule(NamedTuple):
    """A substitution: every match of `pattern` is replaced by `replacement`; `why` documents the reason."""

    pattern: re.Pattern[str]
    replacement: str
    why: str


def _table(*rules: tuple[str, str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(re.compile(pattern), replacement, why) for pattern, replacement, why in rules)


ADDRESSES = _table(
    ("<person>", "person", "placeholder for an anonymized name; it would otherwise be parsed as an HTML tag"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{SITE})", "", "web address"),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{SITE})", "", "web address, including one that the previous rule joined"),
)

REMAINS = _table(
    (r"@\w+", "", "user name"),
    ("[\u31c0-\u9fff]+", "", "Chinese characters, strokes, enclosed and squared signs, hexagrams"),
    (rf"[\{DASHES}]+", "-", "one kind of dash"),
    ("[`´«»“”¨]", '"', "one kind of double quote"),
    ("[‘’]", "'", "one kind of single quote"),
    ("&quot;?", "", "entity"),
    ("&amp", "", "entity"),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " ", "IP address"),
    (r"\d:\d\d\s+$", "", "time of day, or an article number, at the end"),
    (r"\\n", " ", "escaped line break"),
    (r"#\d{1,3}\b", "", "list number"),
    (r"#\d{5,}\b", "", "article number"),
    (r"\b\d{6,}\b", "", "article number"),
    (rf"(?<!\S)\S+\.{FILE_TYPE}", "", "file name"),
    ("[\"']{2,}", '"', '"""sold out"""'),
    (r"\.{2,}", " ", "dots"),
    (r"[#®•©™&@·º½¾¿¡§~()\[\]{}|\\/*]+", " ", "***sold out***, #sunset"),
    (r"\s+\.\s+", " ", "lone full stop"),
)

JOINT = re.compile("[-_]")
JOINTS_OF_A_SLUG = 4  # this-is-my-cute-cat

LEFTOVERS = _table(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", "", "code such as jc6640"),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", "", "code such as jc6640vc"),
    (r"\b\d+[a-zA-Z]+\d+\b", "", "code such as 6640vc231; also 10x20"),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", "", "advertisement"),
    (r"(?:free\s)?download(?:\sfree)?", "", "advertisement"),
    (r"\bclick\b\s(?:for|on)\s\w+", "", "advertisement"),
    (rf"\b{FILE_TYPE}(?:\simages?)?", "", "file type"),
    (r"\bpage\s+\d+\b", "", "page number"),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " ", "code such as j2d1a2a"),
    (r"\b\d+\.?\d*[x\u0445×]\d+\.?\d*\b", "", "dimensions; \u0445 is the Cyrillic letter"),
    (r"\b\s+:\s+", ": ", "space before a colon"),
    (r"(\D[,./])\b", r"\1 ", "missing space after a comma, a full stop or a slash"),
    (r"\s+", " ", "one kind of space"),
    ("^[\"'](.+)[\"']$", r"\1", "quotes around the whole caption"),
    ("^['_,\\-:;]", "", "punctuation at the start"),
    ("['_,\\-:+]$", "", "punctuation at the end"),
    (r"^\.\S+$", "", "caption that is only a file extension"),
)


def clean_caption(text: str) -> str:
    """Returns the cleaned caption in lower case, which may be empty.

    Raises:
        UserError: The package ftfy or beautifulsoup4 is not installed.
    """
    return clean_caption_once(clean_caption_once(text))


def clean_captions(texts: Sequence[str], cleaning: str) -> list[str]:
    """Cleans captions with the rules that a manifest names in `caption_cleaning`.

    Raises:
        UserError: The rules are unknown, or a package that they need is not installed.
    """
    if cleaning not in ("none", CLEANING_VERSION):
        raise UserError(
            f"The shards use caption cleaning '{cleaning}', but this version supports only '{CLEANING_VERSION}' and "
            "'none'. Rebuild the shards with python -m micro_dit.precompute."
        )
    return [clean_caption(text) for text in texts] if cleaning == CLEANING_VERSION else list(texts)


def clean_caption_once(text: str) -> str:
    """Applies the rules once. A caption needs two passes because the output of the first can match a rule again."""
    caption = urllib.parse.unquote_plus(text).strip().lower()
    caption = _apply(ADDRESSES, caption)
    if "<" in caption or "&" in caption:
        caption = _markup_parser()(caption)
    caption = _apply(REMAINS, caption)
    if len(JOINT.findall(caption)) >= JOINTS_OF_A_SLUG:
        caption = JOINT.sub(" ", caption)
    if not (caption.isascii() and caption.isprintable()):  # for plain ASCII both are no-ops, as no '&' is left
        caption = html.unescape(html.unescape(_encoding_repairer()(caption)))
    return _apply(LEFTOVERS, caption.strip()).strip()


def _apply(rules: tuple[Rule, ...], caption: str) -> str:
    for pattern, replacement, _ in rules:
        caption = pattern.sub(replacement, caption)
    return caption


@functools.cache
def _markup_parser() -> Callable[[str], str]:
    """Returns a function that extracts the text from HTML and resolves entities."""
    try:
        import bs4
    except ImportError as error:
        raise UserError("Caption cleaning requires beautifulsoup4. Run pip install beautifulsoup4.") from error
    # Beautiful Soup warns about captions that look like a file name or a URL.
    warnings.filterwarnings("ignore", category=bs4.MarkupResemblesLocatorWarning)

    def parse(caption: str) -> str:
        try:
            return str(bs4.BeautifulSoup(caption, "html.parser").text)
        except (bs4.exceptions.ParserRejectedMarkup, UnicodeEncodeError):  # "<![" outside HTML; lone surrogate
            return caption

    return parse


@functools.cache
def _encoding_repairer() -> Callable[[str], str]:
    """Returns a function that repairs text decoded with the wrong encoding and normalizes unusual characters."""
    try:
        import ftfy
    except ImportError as error:
        raise UserError("Caption cleaning requires ftfy. Run pip install ftfy.") from error
    return ftfy.fix_text
