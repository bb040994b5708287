"""Which attention heads carry a task: causal indirect effects by head (Todd et al. 2024, arXiv 2310.15213).

CIE(l, h | p) = P(y | p, z[l, h] := mean[l, h]) - P(y | p)      p: a prompt with permuted outputs, y: its answer
AIE(l, h)     = mean over prompts of CIE(l, h | p)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from tv_lens.display import figure, html_table
from tv_lens.edits import Head
from tv_lens.errors import TvLensError
from tv_lens.files import from_json, read_whole, typed, write_whole
from tv_lens.provenance import Option, versions
from tv_lens.tensor_files import TensorFile

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

# How an effect is measured: the change of P(y) or of log P(y), the natural logarithm.
Measure = Literal["probability", "log-probability"]
# How it is computed: by replacing each head's output, or by a first-order estimate from one gradient for all heads.
How = Literal["exact", "attribution"]

_FILE = TensorFile("tv_lens_heads", "head effects", format=1)


@dataclass(frozen=True)
class FewShot:
    """How the model does on the uncorrupted prompts.

    Attributes:
        n: how many prompts there are.
        right: for how many the first token of the answer is the most likely one.
        probability: the answer's mean probability.
        majority: how many have the most frequent answer.

    Examples:
        >>> FewShot(n=10, right=8, probability=0.6, majority=2).accuracy
        0.8
    """

    n: int
    right: int
    probability: float
    majority: int

    @property
    def accuracy(self) -> float:
        """The share of prompts."""
        return self.right / self.n


@dataclass(frozen=True, repr=False, eq=False)
class HeadEffects:
    """The effect of every attention head on every corrupted prompt. What `head_effects` returns.

    Attributes:
        values: `values[i, j, h]` is the effect of head `h` of layer `layers[j]` on prompt `i`: a difference of
            probabilities (-1 to 1) or of log-probabilities, by `measure`; float32, on the CPU, NaN for heads that were
            left out.
        baseline: log P(answer) on each corrupted prompt as it is.
        model: the model's name.
        task: the task's name.
        layers: the layers that have heads.
        n_layers: the number of the model's blocks.
        measure: "probability" or "log-probability".
        how: "exact" or "attribution".
        seeds: each prompt was corrupted once for each seed; the rows of the first seed come first.
        prompts: the texts of the prompts.
        answers: their answers.
        first_tokens: how many different tokens the answers begin with.
        few_shot: how the model does on the prompts that the means are from.
        options: how the prompts were corrupted.
        versions: of the packages.

    Raises:
        TvLensError: parts that do not fit together.

    Examples:
        >>> means = tv.read_heads(model, prompts)
        >>> effects = tv.head_effects(model, prompts, means, how="attribution")
        >>> effects.top(3) == tuple(Head(row.layer, row.head) for row in effects.to_pandas().head(3).itertuples())
        True
    """

    values: Float[Tensor, "prompt layer head"]
    baseline: Float[Tensor, " prompt"]
    model: str
    task: str
    layers: tuple[int, ...]
    n_layers: int
    measure: Measure = "probability"
    how: How = "exact"
    seeds: tuple[int, ...] = (0,)
    prompts: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    first_tokens: int = 0
    few_shot: FewShot | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", self.values.detach().to("cpu", torch.float32, copy=True))
        object.__setattr__(self, "baseline", self.baseline.detach().to("cpu", torch.float32, copy=True))
        n_prompts, n_layers, _ = self.values.shape if self.values.ndim == 3 else (0, 0, 0)
        fits = n_prompts == len(self.baseline) > 0 and n_layers == len(set(self.layers)) == len(self.layers) > 0
        if not (fits and self.seeds and n_prompts % len(self.seeds) == 0):
            raise TvLensError(
                f"effects of shape {tuple(self.values.shape)} for {len(self.baseline)} prompts, the layers "
                f"{list(self.layers)[:12]} and {len(self.seeds)} seeds do not fit together; expected (prompt, layer, "
                "head)"
            )
        if not all(0 <= layer < self.n_layers for layer in self.layers):
            raise TvLensError(f"layers {list(self.layers)[:12]} are not those of a model with {self.n_layers} layers")
        if self.measure not in get_args(Measure) or self.how not in get_args(How):
            raise TvLensError(
                f"measure {self.measure!r}, how {self.how!r}: use {get_args(Measure)} and {get_args(How)}"
            )
        if bool(self.values.isinf().any()) or not bool(self.baseline.isfinite().all()):
            raise TvLensError(
                "effects are infinite; a half-precision model may overflow, run it in float32 or bfloat16"
            )

    def __repr__(self) -> str:
        return (
            f"HeadEffects({self.task!r} of {self.model}: {len(self)} prompts, {len(self.heads)} heads, "
            f"{self.how}, {self.measure})"
        )

    def __len__(self) -> int:
        """The number of prompts, each of which may have been corrupted in several ways."""
        return len(self.values) // len(self.seeds)

    @property
    def heads(self) -> tuple[Head, ...]:
        """The heads that have an effect here, in the order of layers."""
        scored = (~self.values.isnan()).all(dim=0).nonzero().tolist()
        return tuple(Head(self.layers[slot], head) for slot, head in scored)

    @property
    def by_prompt(self) -> Float[Tensor, "prompt layer head"]:
        """The effects on each prompt, averaged over the seeds of its corruption."""
        return reduce(self.values, "(seed prompt) layer head -> prompt layer head", "mean", seed=len(self.seeds))

    def mean(self) -> Float[Tensor, "layer head"]:
        """The average indirect effect of each head."""
        return reduce(self.values, "prompt layer head -> layer head", "mean")

    def at(self, head: tuple[int, int]) -> float:
        """The average indirect effect of one head, given as (layer, head).

        Args:
            head: a (layer, head) pair.

        Returns:
            The average indirect effect of that head.

        Raises:
            TvLensError: a head that has none.
        """
        chosen = Head(*head)
        if chosen not in self.heads:
            raise TvLensError(f"{self!r} has no effect of head {chosen}")
        return float(self.mean()[self.layers.index(chosen.layer), chosen.head])

    def interval(
        self, confidence: float = 0.95, *, simultaneous: bool = False
    ) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
        """The t interval of each head's average effect, for prompts drawn independently.

        Args:
            confidence: of each interval, or of all together.
            simultaneous: whether all heads' intervals hold together with this confidence (Bonferroni), which is what it
                takes to say that some head has an effect at all. Otherwise one in forty lies above 0 by chance.

        Returns:
            The lower and the upper ends.

        Raises:
            TvLensError: a single prompt.
        """
        from scipy.stats import t

        n = len(self)
        if n < 2:
            raise TvLensError("an interval over prompts needs two prompts or more")
        error = (1 - confidence) / (len(self.heads) if simultaneous else 1)
        effects = self.by_prompt
        margin = float(t.ppf(1 - error / 2, n - 1)) * effects.std(dim=0) / math.sqrt(n)
        return effects.mean(dim=0) - margin, effects.mean(dim=0) + margin

    def top(self, k: int) -> tuple[Head, ...]:
        """The heads of the highest average effect, the highest first; ties in the order of layers.

        Args:
            k: how many.

        Returns:
            (layer, head) pairs.

        Raises:
            TvLensError: fewer than one, or more than there are.
        """
        if not 1 <= k <= len(self.heads):
            raise TvLensError(f"top({k}): there are {len(self.heads)} heads with an effect; use 1 to that many")
        means = self.mean()
        effect = {head: float(means[self.layers.index(head.layer), head.head]) for head in self.heads}
        return tuple(sorted(self.heads, key=lambda head: (-effect[head], head))[:k])

    @property
    def significant(self) -> tuple[Head, ...]:
        """The heads whose effect is above 0 by the simultaneous 95% interval, the highest effect first."""
        if len(self) < 2:
            return ()
        low, _ = self.interval(simultaneous=True)
        return tuple(
            head for head in self.top(len(self.heads)) if float(low[self.layers.index(head.layer), head.head]) > 0
        )

    @property
    def diagnosis(self) -> tuple[str, ...]:
        """What speaks against these effects, and what to try; nothing if nothing does."""
        return tuple(text for text in (self._few_shot_text(), self._corruption_text(), *self._effect_texts()) if text)

    def _few_shot_text(self) -> str:
        from scipy.stats import binomtest

        known = self.few_shot
        if known is None:
            return ""
        share = known.majority / known.n
        if binomtest(known.right, known.n, share, alternative="greater").pvalue < 0.05:
            return ""
        return (
            f"few-shot accuracy (first token) is {known.accuracy:.2f} of {known.n} prompts, not above the share of the "
            f"most frequent answer ({share:.2f}): the model may not do this task; try more shots, another template or "
            "a larger model"
        )

    def _corruption_text(self) -> str:
        if self.few_shot is None or not self.few_shot.probability:
            return ""
        corrupted = float(self.baseline.exp().mean())
        if corrupted < 0.8 * self.few_shot.probability:
            return ""
        return (
            f"permuted outputs hardly hurt: the answer's mean probability is {corrupted:.3f} with them and "
            f"{self.few_shot.probability:.3f} without, so no head has much to restore; try "
            "corrupt=without_demonstrations"
        )

    def _effect_texts(self) -> list[str]:
        texts = []
        if self.first_tokens == 1 and len(set(self.answers)) > 1:
            texts.append(
                "all answers begin with the same token, so its probability says little about the task; try another "
                "template, such as one without a space before the answer"
            )
        if len(self) < 2:
            texts.append("one prompt gives no interval; use 20 or more")
        elif not self.significant:
            other = "" if self.measure == "log-probability" else "measure='log-probability', "
            texts.append(
                f"no head's effect is above 0 by the simultaneous 95% interval of {len(self.heads)} heads over "
                f"{len(self)} prompts; try more prompts, several seeds, {other}more shots, or a task that the "
                "model does"
            )
        return texts

    def to_pandas(self) -> pd.DataFrame:
        """One row per head, the highest effect first: layer, head, effect with its 95% interval (low, high; see
        `interval`), and whether it is above 0 by the simultaneous one.
        """
        import pandas as pd

        order, effects = self.top(len(self.heads)), self.mean()
        low, high = self.interval() if len(self) > 1 else (effects * math.nan, effects * math.nan)
        significant = set(self.significant)
        cells = [(self.layers.index(head.layer), head.head) for head in order]
        return pd.DataFrame(
            {
                "layer": [head.layer for head in order],
                "head": [head.head for head in order],
                "effect": [float(effects[cell]) for cell in cells],
                "low": [float(low[cell]) for cell in cells],
                "high": [float(high[cell]) for cell in cells],
                "significant": [head in significant for head in order],
            }
        )

    def plot(self, *, mark: int = 10) -> go.Figure:
        """A heat map of the average effects, layers by heads.

        Args:
            mark: how many of the highest are marked.

        Returns:
            A Plotly figure.
        """
        return figure(self, mark=mark)

    def _repr_html_(self) -> str:
        problems = f" Note: {'; '.join(self.diagnosis)}." if self.diagnosis else ""
        formats = dict.fromkeys(("effect", "low", "high"), "{:.4f}")
        return html_table(self.to_pandas(), f"{self!r}: change in {self.measure}.{problems}", formats)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with everything else as JSON in its header, whole or not at all.

        Args:
            path: where to write.

        Raises:
            OSError: the folder is missing or cannot be written to.
        """
        header = {each: getattr(self, each) for each in _Header.__dataclass_fields__}
        write_whole(path, _FILE.pack(asdict(_Header(**header)), {"baseline": self.baseline, "values": self.values}))

    @classmethod
    def load(cls, path: str | Path) -> HeadEffects:
        """Read what `save` wrote, bit for bit. Nothing in the file is executed.

        Args:
            path: the file.

        Returns:
            The effects.

        Raises:
            OSError: the file cannot be read.
            TvLensError: another kind of file, a damaged one, or one of a newer version of tv_lens.
        """
        content = read_whole(path)
        try:
            raw, tensors = _FILE.unpack(content)
            header = typed(raw, _Header)
            if set(tensors) != {"baseline", "values"}:
                raise TvLensError(f"it holds {sorted(tensors)}")
            return cls(tensors["values"], tensors["baseline"], **vars(header))
        except TvLensError as error:
            raise TvLensError(f"{path}: not a file of head effects, or a damaged one ({error})") from error


@dataclass(frozen=True)
class _Header:
    """The JSON in a file's header, with its types."""

    model: str
    task: str
    layers: tuple[int, ...]
    n_layers: int
    measure: Measure
    how: How
    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    first_tokens: int
    few_shot: FewShot | None
    options: dict[str, Option]
    versions: dict[str, str]


def across_tasks(effects: Sequence[HeadEffects]) -> HeadEffects:
    """The effects averaged over tasks, for a set of heads that serves them all.

    Args:
        effects: those of each task, of one model and one measure.

    Returns:
        Effects with one row per task, so intervals are about tasks drawn independently.

    Raises:
        TvLensError: no effects, or effects of different models, heads or measures.

    Examples:
        >>> effects = tv.head_effects(model, prompts, tv.read_heads(model, prompts), how="attribution")
        >>> len(tv.across_tasks([effects, effects]))
        2
    """
    if not effects:
        raise TvLensError("there are no effects to average; give those of two tasks or more")
    first = effects[0]
    for each in effects[1:]:
        same = (each.model, each.measure, each.heads, each.values.shape[1:])
        if same != (first.model, first.measure, first.heads, first.values.shape[1:]):
            raise TvLensError(f"{first!r} and {each!r} cannot be averaged; make both in the same way")
    return replace(
        first,
        values=torch.stack([each.mean() for each in effects]),
        baseline=torch.stack([each.baseline.mean() for each in effects]),
        task=" + ".join(each.task for each in effects),
        how="exact" if all(each.how == "exact" for each in effects) else "attribution",
        seeds=(0,),
        prompts=(),
        answers=(),
        first_tokens=0,
        few_shot=None,
        options={"tasks": len(effects)},
    )


@dataclass(frozen=True)
class _List:
    """A published list of heads: layer, head and perhaps effect of each."""

    top_heads: list[list[int | float]]


def published_heads(path: str | Path) -> tuple[Head, ...]:
    """The heads of a published list, in its order.

    Args:
        path: a JSON file that holds `{"top_heads": [[layer, head], ...]}`, or just the list, whose entries may have an
            effect in third position.

    Returns:
        (layer, head) pairs, for `function_vector`.

    Raises:
        OSError: the file cannot be read.
        TvLensError: not such a list.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "heads.json"
        ...     _ = file.write_text('{"top_heads": [[15, 2, 0.3], [12, 15, 0.1]]}')
        ...     published_heads(file)
        (Head(layer=15, head=2), Head(layer=12, head=15))
    """
    try:
        content = from_json(read_whole(path))
        listed = content.get("top_heads") if isinstance(content, dict) else content
        rows = typed({"top_heads": listed}, _List).top_heads
        if not rows or not all(len(row) in (2, 3) and all(isinstance(x, int) for x in row[:2]) for row in rows):
            raise TvLensError("its entries are not [layer, head] or [layer, head, effect]")
    except TvLensError as error:
        raise TvLensError(
            f'{path}: not a list of heads such as {{"top_heads": [[15, 2], [12, 15]]}} ({error})'
        ) from error
    return tuple(Head(int(row[0]), int(row[1])) for row in rows)
