"""What all HTML pages have in common: one file that can be read without a network, with all text escaped."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tv_lens.evidence.controls import CONTROLS
from tv_lens.files import write_whole
from tv_lens.prompts import Template

if TYPE_CHECKING:
    import plotly.graph_objects as go


def environment(*, autoescape: bool = True) -> Environment:
    """The templates of this folder. A missing name is an error."""
    return Environment(
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=PackageLoader("tv_lens", "views"),
    )


def write_page(path: str | Path, name: str, figures: Mapping[str, go.Figure], /, **values: Any) -> None:
    """Fill in the template of this name, and write the page whole or not at all. All values but `Markup` are shown as
    text. The figures, by the names that `data-figure` has in the template, are drawn by the page's script.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    from plotly.offline import get_plotlyjs
    from plotly.utils import PlotlyJSONEncoder

    contents = {
        "plotly": get_plotlyjs(),
        "figures": {each: figure.to_plotly_json() for each, figure in figures.items()},
    }
    packed = Markup(pack(json.dumps(contents, cls=PlotlyJSONEncoder)))
    page = environment().get_template(name).render(packed=packed, **values)
    write_whole(path, page.encode("utf-8", "replace"))  # a lone surrogate cannot be written, and reads as "?"


def pack(text: str) -> str:
    """Text for a script element, at a third of its size: gzip, in the digits of Python's base 85 with "," for "<", so
    that nothing in it can end the element. The page unpacks it.
    """
    compressed = gzip.compress(text.encode("utf-8", "surrogatepass"), compresslevel=9, mtime=0)
    return base64.b85encode(compressed).decode("ascii").replace("<", ",")


def describe_format(template: Mapping[str, Any]) -> str:
    """A prompt format, as an experiment's settings hold it, in words."""
    if template["kind"] == Template.__name__:
        return f"{template['example']!r}, between demonstrations {template['separator']!r}"
    return ", ".join(f"{name} {value!r}" for name, value in template.items())


def describe_controls(names: list[str]) -> str:
    """What each control is."""
    known = {control.name: control.description for control in CONTROLS}
    return ", ".join(f"{known[name]} ({name})" if name in known else f"{name} (custom)" for name in names)
