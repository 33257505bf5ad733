"""Cleaning and windows, on a made-up sample."""

from __future__ import annotations

import torch

from fp4compile.demo.text import clean, windows

LONG = "A sentence of prose. " * 30
SAMPLE = f"""<doc id="1" url="u" title="Kept &amp; unescaped">
Kept &amp; unescaped

{LONG}&lt;b&gt;
</doc>
<doc id="2" title="Stub">
Stub

Too short.
</doc>
<doc id="3" title="Long title only">
{LONG}
</doc>
between articles
<doc id="4" title="Last">
Last
{LONG}
second line
</doc>
"""


class Characters:
    """A tokenizer whose ids are character codes."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return type("Encoding", (), {"ids": [ord(c) for c in text]})


def test_short_articles_and_tags_go_entities_are_resolved():
    assert clean(SAMPLE) == f"Kept & unescaped\n\n{LONG}<b>\n\nLast\n{LONG}\nsecond line\n"


def test_the_title_does_not_count_towards_the_length():
    article = "<doc id='1' title='t'>\n{title}\n{body}\n</doc>"
    assert clean(article.format(title="t", body="x" * 500)) == "t\n" + "x" * 500 + "\n"
    assert clean(article.format(title="t" * 500, body="x" * 499)) == "\n"


def test_windows_are_evenly_spread_whole_and_in_order():
    text = "".join(chr(0x100 + i // 512) for i in range(512 * 7 + 100))
    found = windows(Characters(), text, 3)
    assert found.shape == (3, 512)
    assert [row.unique().tolist() for row in found] == [[0x100], [0x102], [0x104]]  # every second of seven


def test_no_more_windows_than_the_text_has():
    assert windows(Characters(), "a" * 1100, 5).shape == (2, 512)
    assert torch.equal(windows(Characters(), "a" * 1100, 1), torch.full((1, 512), ord("a")))
