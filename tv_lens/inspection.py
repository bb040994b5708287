"""What a prompt looks like to the model: its tokens, what each is for, and which of them an edit would touch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tv_lens.display import figure, html_table
from tv_lens.edits import Positions
from tv_lens.engines import Model, ModelInfo, engine_for
from tv_lens.prompts import Prompt, as_prompts

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, repr=False)
class TokenTable:
    """The tokens of one prompt, in order. What `show_tokens` returns.

    Attributes:
        model: the model's name.
        tokens: as they are written.
        ids: their numbers.
        positions: counted from the end; -1 is the last token.
        roles: what each token is for: "bos", "input", "separator" (between input and output), "output", "boundary"
            (between demonstrations), "query" or "template".
        edited: whether an edit would write to it.
        bos: what was put in front of the text, and why.

    Examples:
        >>> tv.show_tokens(model, "hot ->").positions
        (-3, -2, -1)
    """

    model: str
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    positions: tuple[int, ...]
    roles: tuple[str, ...]
    edited: tuple[bool, ...]
    bos: str

    def to_pandas(self) -> pd.DataFrame:
        """One row per token: position, token, id, role, edited."""
        import pandas as pd

        columns = {"position": self.positions, "token": self.tokens, "id": self.ids, "role": self.roles}
        return pd.DataFrame({**columns, "edited": self.edited})

    def plot(self) -> go.Figure:
        """The prompt as it is written, colored by role, with a frame around the tokens that are edited."""
        return figure(self)

    def __repr__(self) -> str:
        return f"TokenTable({self.model}: {len(self.tokens)} tokens, {sum(self.edited)} of them edited; {self.bos})"

    def __str__(self) -> str:
        table = self.to_pandas()
        table["token"] = table["token"].map(repr)
        return f"{self.model}: {self.bos}\n{table.to_string(index=False)}"

    def _repr_html_(self) -> str:
        table = self.to_pandas()
        table["token"] = table["token"].map(repr)  # white space shows
        return html_table(table, f"{self.model}: {self.bos}")


def show_tokens(
    model: Model, prompt: Prompt | str, *, positions: Positions = "last", keep_demonstrations: bool = True
) -> TokenTable:
    """The tokens of a prompt as the model gets them, and which of them `positions` names.

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        prompt: a prompt, or a plain string.
        positions: what an edit would touch, as in `patch_generate`.
        keep_demonstrations: False shows the query alone, which is what `patch_generate` runs by default.

    Returns:
        A table of token, id, position and role.

    Raises:
        TvLensError: a prompt without tokens, or one that lacks the positions.

    Examples:
        >>> table = tv.show_tokens(model, "hot ->", positions="last")
        >>> table.tokens, table.edited
        (('<s>', 'hot', ' ->'), (False, False, True))
    """
    engine = engine_for(model)
    [given] = as_prompts([prompt])
    shown = given if keep_demonstrations else given.zero_shot()
    [ids] = engine.text.encode([shown.text])
    edited = set(engine.text.positions(shown, ids, positions, 0))
    numbers = range(-len(ids), 0)
    info = engine.info
    return TokenTable(
        model=info.name,
        tokens=tuple(engine.text.token(token) for token in ids),
        ids=tuple(ids),
        positions=tuple(numbers),
        roles=tuple(engine.text.roles(shown, ids)),
        edited=tuple(each in edited for each in numbers),
        bos=_bos_note(info, shown.text),
    )


def _bos_note(info: ModelInfo, text: str) -> str:
    """What is put in front of a text, and why."""
    if info.bos and text.startswith(info.bos):
        return f"the text begins with its own {info.bos!r}, so nothing is put in front"
    note = f"{info.bos!r} is put in front" if info.bos else "nothing is put in front"
    return f"{note}, {info.bos_reason}" if info.bos_reason else note
