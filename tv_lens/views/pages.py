"""What all HTML pages have in common: one file that can be read without a network, with all text escaped."""

from __future__ import annotations

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


def write_page(path: str | Path, name: str, /, **values: Any) -> None:
    """Fill in the template of this name, and write the page whole or not at all. All values but `Markup` are shown as
    text.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    from plotly.offline import get_plotlyjs

    page = environment().get_template(name).render(plotly=Markup(get_plotlyjs()), **values)
    write_whole(path, page.encode("utf-8", "replace"))  # a lone surrogate cannot be written, and reads as "?"


def for_script(figure: go.Figure) -> Markup:
    """A figure as JSON for a script element: nothing in it can end the element."""
    return Markup(figure.to_json().replace("<", "\\u003c"))


def describe_format(template: Mapping[str, Any]) -> str:
    """A prompt format, as an experiment's settings hold it, in words."""
    if template["kind"] == Template.__name__:
        return f"{template['example']!r}, between demonstrations {template['separator']!r}"
    return ", ".join(f"{name} {value!r}" for name, value in template.items())


def describe_controls(names: list[str]) -> str:
    """What each control is."""
    known = {control.name: control.description for control in CONTROLS}
    return ", ".join(f"{known[name]} ({name})" if name in known else f"{name} (custom)" for name in names)
