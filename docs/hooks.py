"""What mkdocs runs: pictures come from the examples, and the names that tests give to blocks of code are not shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with ```python name as ```python."""
    return re.sub(r"^```(python|bash) \w+$", r"```\1", markdown, flags=re.M)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """With the pictures of the README."""
    examples = Path(config.docs_dir).parent / "examples"
    for picture in sorted((examples / "pictures").glob("*.png")):
        path = picture.relative_to(examples).as_posix()
        files.append(File(path, str(examples), config.site_dir, config.use_directory_urls))
    return files
