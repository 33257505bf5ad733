"""English Wikipedia prose out of the PyPI package `exllamav2`, cleaned and cut into windows. CC BY-SA: fetched when needed, not shipped."""

from __future__ import annotations

import html
import re
from typing import Any, Final

import torch
from torch import Tensor

from fp4compile.demo.download import WheelFile

WIKIPEDIA: Final = WheelFile(
    requirement="exllamav2==0.3.2",
    wheel="exllamav2-0.3.2-py3-none-any.whl",
    size="1.5 MB",
    member="exllamav2/conversion/standard_cal_data/wiki.utf8",
    sha256="d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7",
)
CLEANED_SHA256: Final = "9e9267cbceb194ebb3f93dfaf2a18d3a53a6564e64c8ff96a1cc27b71f0a1048"
WINDOW: Final = 512
_ARTICLE: Final = re.compile(r"<doc id=[^>]*>\n(.*?)\n</doc>", re.DOTALL)
_SHORTEST: Final = 500  # characters after the title line; shorter ones are lists, stubs and redirects


def clean(raw: str) -> str:
    """The articles worth reading, joined by blank lines, with a newline at the end."""
    articles = (html.unescape(body).strip() for body in _ARTICLE.findall(raw))
    return "\n\n".join(a for a in articles if len(a.partition("\n")[2].strip()) >= _SHORTEST) + "\n"


def windows(tokenizer: Any, text: str, count: int) -> Tensor:
    """(count, 512) int64: non-overlapping windows spread evenly over the text, without a begin-of-text token."""
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    whole = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    return whole[:: max(len(whole) // count, 1)][:count]
