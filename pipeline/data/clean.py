"""Captions as the web has them -> the text that was meant.

Enters: captions. Leaves: the same with encoding, HTML entities and markup mended.
Must not know: where captions come from, or what is done with them.
"""

import re
from collections.abc import Sequence

import ftfy
from bs4 import BeautifulSoup

# What is broken is mended; ordinary Unicode (curly quotes, ligatures, full-width letters, accents
# as marks of their own) stays as it is.
ENCODING = ftfy.TextFixerConfig(
    unescape_html=True,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    normalization=None,
    explain=False,
)
SEPARATING = (
    "address", "article", "aside", "blockquote", "br", "center", "dd", "div", "dl", "dt",
    "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr",
    "img", "input", "li", "main", "nav", "ol", "p", "pre", "section", "table", "tbody", "td", "th",
    "thead", "tr", "ul",
)  # fmt: skip
INLINE = (
    "a", "abbr", "b", "big", "body", "button", "cite", "code", "del", "em", "font", "head", "html",
    "i", "iframe", "ins", "label", "link", "meta", "q", "s", "script", "small", "span", "strike",
    "strong", "style", "sub", "sup", "title", "u",
)  # fmt: skip
# Whole tags of HTML, bare or with attributes, and comments. All else that begins with "<" is text:
# "<3", "a < b", data sets' own marks such as <PERSON>. Possessive, so that time grows linearly.
_REST = (
    rf"(?:/?(?:{'|'.join(SEPARATING + INLINE)})(?:\s++[^<>=]*+=[^<>]*+|\s*+/?)|!--[^<>]*+(?<=--))>"
)
MARKUP = re.compile(f"<{_REST}", re.IGNORECASE)
NO_MARKUP = re.compile(f"<(?!{_REST})", re.IGNORECASE)
ROUNDS = 8  # entities may hold tags, and these hold entities: so deep, at most


def clean_captions(captions: Sequence[str]) -> list[str]:
    """Clean each caption; one of which nothing is left is left out."""
    return [text for caption in captions if (text := clean_caption(caption))]


def clean_caption(text: str) -> str:
    """Mend encoding, decode entities, take out tags and scripts; one line, maybe an empty one."""
    for _ in range(ROUNDS):
        before, text = text, ftfy.fix_text(text, ENCODING)
        text = " ".join(_without_markup(text).split())
        if text == before:
            break
    return text


def _without_markup(text: str) -> str:
    if not MARKUP.search(text):
        return text
    # Entities are decoded by now: an "&" is one.
    escaped = NO_MARKUP.sub("&lt;", text.replace("&", "&amp;"))
    tree = BeautifulSoup(escaped, "html.parser")
    for tag in tree.find_all(SEPARATING):
        tag.insert_before(" ")
        tag.insert_after(" ")
    return tree.get_text()  # leaves out comments, scripts and styles
