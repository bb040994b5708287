"""What all HTML pages have in common: one file that can be read without a network, with all text escaped."""

from __future__ import annotations

import base64
import json
import lzma
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from tv_lens.evidence.controls import CONTROLS
from tv_lens.files import write_whole
from tv_lens.prompts import Template
from tv_lens.views.drawing import IN_THE_DARK

if TYPE_CHECKING:
    import plotly.graph_objects as go


@cache
def environment(*, autoescape: bool = True) -> Environment:
    """The templates of this folder. A missing name is an error."""
    made = Environment(
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=PackageLoader("tv_lens", "views"),
    )
    made.filters["digits"] = lambda number: f"{number:.6g}"
    made.filters["interval"] = _interval
    return made


def _interval(value: Any) -> Markup:
    """A number with its interval, as HTML that lets a line end before the interval and not in it."""
    number, mark, rest = str(value).partition(" [")
    return Markup("{} <span>[{}</span>").format(number, rest) if mark else escape(number)


def filled(name: str, /, **values: Any) -> str:
    """The template of this name, with all values but `Markup` as text."""
    return environment().get_template(name).render(**values)


def write_page(
    path: str | Path,
    name: str,
    figures: Mapping[str, go.Figure],
    /,
    *,
    parts: Mapping[str, str] | None = None,
    **values: Any,
) -> None:
    """Fill in the template of this name, and write the page whole or not at all. All values but `Markup` are shown as
    text.

    Args:
        path: the page.
        name: the template.
        figures: what the page's script draws, by the names that `data-figure` has in the template.
        parts: HTML that is packed and that the script writes into the page, by the names that `data-part` has in the
            template.
        values: what the template shows.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    contents = {**_drawn(figures), "parts": parts or {}}
    packed = {"plotly": Markup(_packed_plotly()), "packed": Markup(pack(json.dumps(contents)))}
    text = filled(name, in_the_dark=dict(IN_THE_DARK), **packed, **values)
    write_whole(path, text.encode("utf-8", "replace"))  # a lone surrogate cannot be written, and reads as "?"


def _drawn(figures: Mapping[str, go.Figure]) -> dict[str, Any]:
    """The figures as JSON with numbers of six digits, each with the number of its Plotly template, and the templates
    without the kinds of traces that no figure has.
    """
    from plotly.utils import PlotlyJSONEncoder

    text = json.dumps({each: figure.to_plotly_json() for each, figure in figures.items()}, cls=PlotlyJSONEncoder)
    drawn = json.loads(text, parse_float=lambda number: float(f"{float(number):.6g}"))
    kinds = {trace["type"] for figure in drawn.values() for trace in figure["data"]}
    templates: list[Any] = []
    for figure in drawn.values():
        template = figure["layout"].pop("template")
        if template not in templates:
            templates.append(template)
        figure["template"] = templates.index(template)
    for template in templates:
        template["data"] = {kind: looks for kind, looks in template.get("data", {}).items() if kind in kinds}
    return {"figures": drawn, "templates": templates}


@cache
def _packed_plotly() -> str:
    from plotly.offline import get_plotlyjs

    return pack(get_plotlyjs())


def pack(text: str) -> str:
    """Text for a script element, at less than a third of its size: the number of its bytes, then LZMA, in the digits of
    Python's base 85 with "," for "<", so that nothing in it can end the element. `unpacked` in unpack.js reads it.
    """
    content = text.encode("utf-8", "surrogatepass")
    compressed = lzma.compress(content, format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA1, "preset": 6}])
    return base64.b85encode(len(content).to_bytes(4, "big") + compressed).decode("ascii").replace("<", ",")


def describe_format(template: Mapping[str, Any]) -> str:
    """A prompt format, as an experiment's settings hold it, in words."""
    if template["kind"] == Template.__name__:
        return f"{template['example']!r}, between demonstrations {template['separator']!r}"
    return ", ".join(f"{name} {value!r}" for name, value in template.items())


def describe_controls(names: list[str]) -> str:
    """What each control is."""
    known = {control.name: control.description for control in CONTROLS}
    return ", ".join(f"{known[name]} ({name})" if name in known else f"{name} (custom)" for name in names)
