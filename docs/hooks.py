"""What mkdocs runs: pictures come from the examples, the names that tests give to blocks of code are not shown, and
pages can be used with a keyboard and a screen reader.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with ```python name as ```python."""
    return re.sub(r"^```(python|bash) \w+$", r"```\1", markdown, flags=re.M)


def on_post_page(output: str, **_: Any) -> str:
    """The page with what the theme leaves out: a table can be reached by Tab, so that it can be scrolled; the search
    has a name; and an empty corner of a table is not a heading.
    """
    output = output.replace('role="dialog"', 'role="dialog" aria-label="Search"')
    return output.replace("<th></th>", "<td></td>").replace("<table>", '<table tabindex="0">')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """With the pictures of the README."""
    examples = Path(config.docs_dir).parent / "examples"
    for picture in sorted((examples / "pictures").glob("*.png")):
        path = picture.relative_to(examples).as_posix()
        files.append(File(path, str(examples), config.site_dir, config.use_directory_urls))
    return files
