"""Captions as the web has them, and what they were meant to be."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.clean import clean_caption, clean_captions

MENDED = {
    "schÃ¶n": "schön",
    "â€œquotedâ€\x9d": "“quoted”",
    "ðŸ˜€ hi": "😀 hi",
    "Tom &amp; Jerry": "Tom & Jerry",
    "Tom &amp;amp; Jerry": "Tom & Jerry",
    "it&#8217;s&nbsp;here": "it’s here",
    "I &lt;3 you": "I <3 you",
    "a <b>big</b> dog": "a big dog",
    "<b>bold</b>ly": "boldly",
    "H<sub>2</sub>O": "H2O",
    'see <a href="http://x.org/?a=1&amp;copy=2">here</a> now': "see here now",
    "&lt;i&gt;leaning&lt;/i&gt;": "leaning",
    "one<br>two<BR/>three<p class=x>four</p>five": "one two three four five",
    "<ul><li>one</li><li>two</li></ul>": "one two",
    "dog <script>if (a < b) alert('<b>')</script>cat <style>p {}</style>": "dog cat",
    "a<!-- note -->b": "ab",
    "broken </b> and <i>unclosed": "broken and unclosed",
    " a\t b\n\nc ": "a b c",
    "<br>": "",
    "&nbsp;": "",
}
KEPT = [
    "I <3 you",
    "a < b and c > d",
    "if a<b and c>d then",
    "a photo of <PERSON> in <image>",
    "nice <a href='http://cut.off",
    "AT&T, R&D, ?a=1&copy=2",
    "“curly” ‘quotes’ – it’s…",
    "ﬁne ﬂow, ＡＢＣ １２３, ﾊﾝｶｸ",
    "日本語の写真、東京。",
    "фото кошки, צילום, صورة",
    "👩‍👩‍👧 🇩🇪 ❤️ ☕",
    "cafe\u0301 10³ µm",
    "naïve café, Ærøskøbing, 5 € – £3",
]


@pytest.mark.parametrize(("found", "meant"), MENDED.items())
def test_broken_captions_are_mended(found: str, meant: str) -> None:
    assert clean_caption(found) == meant


@pytest.mark.parametrize("text", KEPT)
def test_what_is_not_broken_stays(text: str) -> None:
    assert clean_caption(text) == text


def test_a_caption_of_which_nothing_is_left_is_left_out() -> None:
    assert clean_captions(["<p>a</p>", "<br>", "b"]) == ["a", "b"]


PARTS = ("<", ">", "<b>", "</b>", "<br/>", "<p a='", "'>", "&", "&lt;", "&gt;", "&amp;", "amp;",
         "<!--", "-->", "<script>", "Ã", "¶", "â€", "😀", "“", " ", "\n", "x", "y z")  # fmt: skip


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PARTS), max_size=12).map("".join) | st.text())
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    cleaned = clean_caption(text)
    assert clean_caption(cleaned) == cleaned
    assert cleaned == " ".join(cleaned.split())


@pytest.mark.parametrize(
    "text",
    [
        "<b>" * 20_000,
        "<" * 3000 + "b>" * 3000,
        "<!--" * 20_000,
        "<a " + "=" * 90_000,
        "<a =" * 9000,
    ],
    ids=["nested", "one in another", "comments", "attributes", "unclosed"],
)
def test_no_text_takes_long(text: str) -> None:
    begun = time.process_time()
    clean_caption(text)
    assert time.process_time() - begun < 5
