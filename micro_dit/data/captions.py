"""Cleans captions that were collected from the web: the rules of DeepFloyd-IF, applied twice.

The rules come from https://github.com/deep-floyd/IF; the training captions of the public release went through them.
They are kept as they are, odd ones included ('3.5x4.5' becomes '3.. 5'), because a model should see at sampling what it
saw in training. The order matters: each rule works on what the ones above it left.
"""

import functools
import html
import re
import urllib.parse
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

from micro_dit.errors import UserError

CLEANING_VERSION = "deepfloyd-2"  # the rules of DeepFloyd-IF, twice

FILE_TYPE = r"(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
SITE = r"[a-z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"  # and not the name in an e-mail address
DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63"
    "\uff0d"
)


class Rule(NamedTuple):
    """Each match of `pattern` becomes `replacement`."""

    pattern: re.Pattern[str]
    replacement: str
    why: str


def _table(*rules: tuple[str, str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(re.compile(pattern), replacement, why) for pattern, replacement, why in rules)


ADDRESSES = _table(
    ("<person>", "person", "a name that the data set hides; it must not be taken for a tag"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{SITE})", "", "web address"),
    (rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{SITE})", "", "web address, also one that the last rule has put together"),
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
    (r"\d:\d\d\s+$", "", "time of day, or an article's number, at the end"),
    (r"\\n", " ", "line break that was written out"),
    (r"#\d{1,3}\b", "", "number in a list"),
    (r"#\d{5,}\b", "", "number of an article"),
    (r"\b\d{6,}\b", "", "number of an article"),
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
    (r"\b\s+:\s+", ": ", "no space before a colon"),
    (r"(\D[,./])\b", r"\1 ", "a space after a comma, a full stop, a slash"),
    (r"\s+", " ", "one kind of space"),
    ("^[\"'](.+)[\"']$", r"\1", "quotes around the whole"),
    ("^['_,\\-:;]", "", "punctuation at the start"),
    ("['_,\\-:+]$", "", "punctuation at the end"),
    (r"^\.\S+$", "", "nothing but a file type"),
)


def clean_caption(text: str) -> str:
    """Cleans a caption to lower case, perhaps to nothing; raises UserError if ftfy or beautifulsoup4 is missing."""
    return clean_caption_once(clean_caption_once(text))


def clean_captions(texts: Sequence[str], cleaning: str) -> list[str]:
    """Cleans texts by the `caption_cleaning` of a manifest; raises UserError if it is unknown or lacks a package."""
    if cleaning not in ("none", CLEANING_VERSION):
        raise UserError(
            f"The captions were cleaned by '{cleaning}', and this code knows '{CLEANING_VERSION}' and 'none': make the "
            "shards again."
        )
    return [clean_caption(text) for text in texts] if cleaning == CLEANING_VERSION else list(texts)


def clean_caption_once(text: str) -> str:
    """Applies the rules once; what one pass leaves can be matched by the next, which is why captions get two."""
    caption = urllib.parse.unquote_plus(text).strip().lower()
    caption = _apply(ADDRESSES, caption)
    if "<" in caption or "&" in caption:
        caption = _markup_parser()(caption)
    caption = _apply(REMAINS, caption)
    if len(JOINT.findall(caption)) >= JOINTS_OF_A_SLUG:
        caption = JOINT.sub(" ", caption)
    if not (caption.isascii() and caption.isprintable()):  # else both would change nothing: the rules leave no '&'
        caption = html.unescape(html.unescape(_encoding_repairer()(caption)))
    return _apply(LEFTOVERS, caption.strip()).strip()


def _apply(rules: tuple[Rule, ...], caption: str) -> str:
    for pattern, replacement, _ in rules:
        caption = pattern.sub(replacement, caption)
    return caption


@functools.cache
def _markup_parser() -> Callable[[str], str]:
    """Returns the function that takes the text out of HTML, entities resolved."""
    try:
        import bs4
    except ImportError as error:
        raise UserError("Cleaning captions needs beautifulsoup4: pip install beautifulsoup4.") from error
    # A caption may look like a file name or an address to it, and is neither.
    warnings.filterwarnings("ignore", category=bs4.MarkupResemblesLocatorWarning)

    def parse(caption: str) -> str:
        try:
            return str(bs4.BeautifulSoup(caption, "html.parser").text)
        except (bs4.exceptions.ParserRejectedMarkup, UnicodeEncodeError):  # "<![" of no HTML at all; half a character
            return caption

    return parse


@functools.cache
def _encoding_repairer() -> Callable[[str], str]:
    """Returns the function that repairs text which was decoded by the wrong encoding, and unusual characters."""
    try:
        import ftfy
    except ImportError as error:
        raise UserError("Cleaning captions needs ftfy: pip install ftfy.") from error
    return ftfy.fix_text
