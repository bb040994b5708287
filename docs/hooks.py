"""What mkdocs runs on each page: tests name the blocks of code that they run, and readers need not see the names."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with ```python name as ```python."""
    return re.sub(r"^```(python|bash) \w+$", r"```\1", markdown, flags=re.M)
