"""The tokens that task vectors point to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tv_lens.display import figure, html_table
from tv_lens.edits import RESID_POST
from tv_lens.engines import Capability, Model, engine_for
from tv_lens.errors import TvLensError
from tv_lens.vectors import TaskVectors, check_layer, layer_label

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True, repr=False)
class TopTokens:
    """The most likely tokens of each vector at one layer, most likely first. What `top_tokens` returns.

    Attributes:
        task: the vectors' task.
        layer: the layer.
        tokens: as they are written.
        ids: their numbers.
        probabilities: of each.
        n_layers: the number of the model's blocks.

    Examples:
        >>> top = tv.top_tokens(model, vector, layer=3, k=2)
        >>> top.probabilities[0][0] >= top.probabilities[0][1]
        True
    """

    task: str
    layer: int
    tokens: tuple[tuple[str, ...], ...]
    ids: tuple[tuple[int, ...], ...]
    probabilities: tuple[tuple[float, ...], ...]
    n_layers: int | None = None

    def __post_init__(self) -> None:
        shapes = {tuple(map(len, each)) for each in (self.tokens, self.ids, self.probabilities)}
        if len(shapes) > 1:
            raise TvLensError("tokens, ids and probabilities have one entry for each vector and rank")

    def to_pandas(self) -> pd.DataFrame:
        """One row per vector and rank: vector (its number), rank (from 1), token as it is written, id, probability."""
        import pandas as pd

        rows = [
            (vector, rank, *row)
            for vector, columns in enumerate(zip(self.tokens, self.ids, self.probabilities, strict=True))
            for rank, row in enumerate(zip(*columns, strict=True), start=1)
        ]
        return pd.DataFrame(rows, columns=["vector", "rank", "token", "id", "probability"])

    def plot(self) -> go.Figure:
        """The probability of each token, one bar each."""
        return figure(self)

    def __repr__(self) -> str:
        rows = [", ".join(map(repr, row[:8])) + (", ..." if len(row) > 8 else "") for row in self.tokens[:3]]
        more = f"; and those of {len(self.tokens) - 3} more vectors" if len(self.tokens) > 3 else ""
        return f"TopTokens({self.task!r} at {layer_label(self.layer, self.n_layers)}: {'; '.join(rows)}{more})"

    def _repr_html_(self) -> str:
        table = self.to_pandas()
        table["token"] = table["token"].map(repr)  # white space shows
        title = f"{self.task} at {layer_label(self.layer, self.n_layers)}: top tokens"
        return html_table(table, title, {"probability": "{:.3f}"})


def top_tokens(model: Model, vectors: TaskVectors, layer: int, k: int = 10) -> TopTokens:
    """The tokens that each vector at `layer` points to, read through the model's own final norm and unembedding as if
    the model stopped there (Hendel et al. 2023, section 6).

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        vectors: vectors of the residual stream; for the task's tokens, pass `vectors.mean()`.
        layer: the layer whose vectors are read.
        k: how many tokens.

    Returns:
        Tokens with their probabilities, the most likely first.

    Raises:
        TvLensError: vectors of other sizes than the model's or of another site than the residual stream, or a layer or
            `k` out of range.
        UnsupportedError: an engine whose unembedding cannot be reached, such as a remote one.

    Examples:
        >>> len(tv.top_tokens(model, vector, layer=3, k=5).tokens[0])
        5
    """
    engine = engine_for(model)
    if not isinstance(vectors, TaskVectors):
        raise TvLensError(
            f"top_tokens takes task vectors, not a {type(vectors).__name__}; write "
            "top_tokens(model, extract(model, prompts, substitutes).mean(), layer)"
        )
    if vectors.site != RESID_POST:
        raise TvLensError(f"these are vectors of {vectors.site}; only the residual stream can be read as tokens")
    vectors.check_constant()
    vectors.check_fits(engine.name, engine.n_layers, engine.d_model)
    check_layer(layer, engine.n_layers, engine.name)
    engine.require(Capability.READOUT)
    if k < 1:
        raise TvLensError(f"k is {k}; ask for 1 token or more")
    if k > engine.info.d_vocab:
        raise TvLensError(f"k must be in [1, {engine.info.d_vocab}], the size of the vocabulary, and is {k}")
    ids, probabilities = engine.readout(vectors.at(layer), k)
    return TopTokens(
        vectors.task,
        layer,
        # Special tokens are decoded to nothing.
        tuple(tuple(engine.text.decode([token]) or f"<token {token}>" for token in row) for row in ids.tolist()),
        tuple(map(tuple, ids.tolist())),
        tuple(map(tuple, probabilities.tolist())),
        engine.n_layers,
    )
