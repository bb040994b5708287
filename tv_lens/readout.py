"""The tokens that task vectors point to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from einops import rearrange

from tv_lens.engines import engine_for, engine_name
from tv_lens.vectors import TaskVectors, check_layer, place
from tv_lens.views.tables import to_html

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True)
class TopTokens:
    """The likeliest tokens of each vector at one layer, likeliest first."""

    task: str
    layer: int
    tokens: tuple[tuple[str, ...], ...]
    ids: tuple[tuple[int, ...], ...]
    probabilities: tuple[tuple[float, ...], ...]
    n_layers: int | None = None

    def to_pandas(self) -> pd.DataFrame:
        """A row for each vector and rank: vector (its number), rank (from 1), token as it is written, id,
        probability.
        """
        import pandas as pd

        rows = [
            (vector, rank, *row)
            for vector, columns in enumerate(zip(self.tokens, self.ids, self.probabilities, strict=True))
            for rank, row in enumerate(zip(*columns, strict=True), start=1)
        ]
        return pd.DataFrame(rows, columns=["vector", "rank", "token", "id", "probability"])

    def plot(self) -> go.Figure:
        """The probability of each token, a bar each."""
        from tv_lens.views.plots import plot_top_tokens

        return plot_top_tokens(self)

    def _repr_html_(self) -> str:
        table = self.to_pandas()
        table["token"] = table["token"].map(repr)  # white space shows
        return to_html(
            table, f"{self.task} at {place(self.layer, self.n_layers)}: top tokens", {"probability": "{:.3f}"}
        )


def top_tokens(model: Any, vectors: TaskVectors, layer: int, k: int = 10) -> TopTokens:
    """The `k` tokens that each vector at `layer` points to, read through the model's own final norm and unembedding
    as if the model stopped there (Hendel et al. 2023, section 6). For the task's, ask of `vectors.mean()`.

    Raises:
        ValueError: vectors of other sizes than the model's, a layer out of range, or `k` out of range.
        TypeError: an engine whose unembedding cannot be had, such as a remote one.
    """
    engine = engine_for(model)
    vectors.check_fits(engine_name(engine), engine.n_layers, engine.d_model)
    check_layer(layer, engine.n_layers, engine_name(engine))
    if not hasattr(engine, "readout"):
        raise TypeError(
            f"{engine_name(engine)} runs where its unembedding cannot be had; boot the model with "
            "TransformerBridge.boot_transformers to see what its vectors say"
        )
    if k < 1:
        raise ValueError(f"k is {k}; ask for 1 token or more")
    ids, probabilities = engine.readout(vectors.at(layer), k)
    tokens = rearrange(ids, "vector k -> (vector k) 1")
    # Special tokens are decoded as nothing.
    words = [word or f"<token {token}>" for word, [token] in zip(engine.decode(tokens), tokens.tolist(), strict=True)]
    return TopTokens(
        vectors.task,
        layer,
        tuple(tuple(words[i : i + k]) for i in range(0, len(words), k)),
        tuple(map(tuple, ids.tolist())),
        tuple(map(tuple, probabilities.tolist())),
        engine.n_layers,
    )
