"""How alike task vectors are, and where they lie to each other.

similarity(a, b) = a . b / (|a| |b|), for each vector of `a` with each of `b`
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from tv_lens.display import figure, html_table
from tv_lens.errors import MissingExtraError, TvLensError
from tv_lens.vectors import TaskVectors, layer_label

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import plotly.graph_objects as go

_RESAMPLES = 999
_MAPS = 'a map needs scikit-learn; pip install "tv_lens[maps]"'

# From rows of numbers to two columns, and a name for each column.
Layout = Callable[["np.ndarray[Any, Any]"], tuple["np.ndarray[Any, Any]", tuple[str, str]]]


def similarity(a: TaskVectors, b: TaskVectors, layer: int) -> Float[Tensor, "a b"]:
    """The cosine between each vector of `a` and each of `b` at `layer`.

    Args:
        a: vectors.
        b: vectors of the same model.
        layer: the layer whose vectors are compared.

    Returns:
        Cosines, -1 to 1.

    Raises:
        TvLensError: vectors of different models, a layer out of range, or a vector of zeros, which points nowhere.

    Examples:
        >>> tv.similarity(vectors, vector, layer=2).shape
        torch.Size([4, 1])
    """
    a.check_same_model(b)
    for each in (a, b):
        each.check_constant()
        zero = (each.at(layer).norm(dim=-1) == 0).nonzero()
        if len(zero):
            raise TvLensError(
                f"vector {int(zero[0])} of {each.task!r} is zero at layer {layer}: it points nowhere, so no cosine"
            )
    one, other = (torch.nn.functional.normalize(each.at(layer).double(), dim=-1) for each in (a, b))
    return (one @ other.T).clamp(-1, 1).float()


@dataclass(frozen=True, eq=False, repr=False)
class Similarities:
    """The cosines between vectors of several tasks at one layer. A vector is never compared with itself. What
    `compare_tasks` returns.

    Attributes:
        layer: the layer.
        tasks: the tasks' names.
        owners: vector `i` belongs to `tasks[owners[i]]`.
        cosines: of vectors `i` and `j`.
        n_layers: the number of the model's blocks.

    Examples:
        >>> other = dataclasses.replace(-vectors, task="another task")
        >>> tv.compare_tasks([vectors, other], layer=2).matrix().shape
        (2, 2)
    """

    layer: int
    tasks: tuple[str, ...]
    owners: tuple[int, ...]
    cosines: Float[Tensor, "vector vector"]
    n_layers: int | None = None

    @property
    def within(self) -> float | None:
        """The mean cosine of two vectors of one task; None if every task has a single vector."""
        return _mean(self.cosines[self._same & ~torch.eye(len(self.owners), dtype=torch.bool)])

    @property
    def between(self) -> float | None:
        """The mean cosine of two vectors of different tasks; None if there is one task."""
        return _mean(self.cosines[~self._same])

    @cached_property
    def p_value(self) -> float | None:
        """The permutation p-value: the share of 999 random relabellings (with a fixed seed) whose gap, within minus
        between, is at least as large. None if there is nothing to compare.
        """
        if self.within is None or self.between is None:
            return None
        from scipy.stats import permutation_test

        cosines = self.cosines.double().fill_diagonal_(0).numpy()  # no vector is compared with itself
        kinds, total, n = sorted(set(self.owners)), float(cosines.sum()), len(self.owners)
        pairs_within = int(self._same.sum()) - n
        pairs_between = n * n - n - pairs_within

        def gap(owners: np.ndarray[Any, Any]) -> float:
            member = (owners[:, None] == kinds).astype(float)  # vector by task
            same = float((member * (cosines @ member)).sum())
            return same / pairs_within - (total - same) / pairs_between

        result = permutation_test(
            ([float(owner) for owner in self.owners],),
            gap,
            permutation_type="pairings",
            n_resamples=_RESAMPLES,
            alternative="greater",
            vectorized=False,
            rng=0,
        )
        return float(result.pvalue)

    @property
    def _same(self) -> Tensor:
        owners = torch.tensor(self.owners)
        return owners[:, None] == owners[None, :]

    def to_pandas(self) -> pd.DataFrame:
        """One row per pair of tasks, including each task with itself: the number of pairs of vectors, their mean
        cosine, and the lowest and highest.
        """
        import pandas as pd

        owners = torch.tensor(self.owners)
        rows = []
        for i, task in enumerate(self.tasks):
            for j, other in enumerate(self.tasks[i:], start=i):
                block = self.cosines[owners == i][:, owners == j]
                if i == j:  # each two once, none with itself
                    block = block[torch.ones_like(block).triu(1).bool()]
                some = block.numel() > 0
                rows.append(
                    {
                        "task": task,
                        "other": other,
                        "pairs": block.numel(),
                        "mean": _mean(block),
                        "lowest": float(block.min()) if some else None,
                        "highest": float(block.max()) if some else None,
                    }
                )
        return pd.DataFrame(rows).astype(dict.fromkeys(("mean", "lowest", "highest"), "Float64"))

    def matrix(self) -> pd.DataFrame:
        """The mean cosines, tasks by tasks; missing for a task with a single vector and itself."""
        import pandas as pd

        table = self.to_pandas()
        both = pd.concat([table, table.rename(columns={"task": "other", "other": "task"})])
        both = both.drop_duplicates(["task", "other"]).pivot(index="task", columns="other", values="mean")
        return both.loc[list(self.tasks), list(self.tasks)]

    def plot(self) -> go.Figure:
        """The mean cosines as a heat map, tasks by tasks."""
        return figure(self)

    def __repr__(self) -> str:
        return f"Similarities({len(self.owners)} vectors of {len(self.tasks)} tasks, {self})"

    def __str__(self) -> str:
        within, between = ("none" if x is None else f"{x:.2f}" for x in (self.within, self.between))
        p = "" if self.p_value is None else f", p {self.p_value:.1g}"
        return (
            f"{layer_label(self.layer, self.n_layers)}: mean cosine within tasks {within}, between tasks {between}{p}"
        )

    def _repr_html_(self) -> str:
        table = self.matrix()
        table.insert(0, "", table.index)  # "" as a task may be called "task"
        return html_table(table, str(self))


def compare_tasks(vectors: Sequence[TaskVectors], layer: int) -> Similarities:
    """How alike the vectors of each task are to each other and to those of the other tasks (the paper's robustness
    experiment, Hendel et al. 2023, section 4).

    Vectors that share demonstrations are not independent: sample the prompts of a task from many inputs.

    Args:
        vectors: those of each task's prompts, not their mean; one entry for each task.
        layer: the layer whose vectors are compared.

    Returns:
        The cosines, with means within and between tasks and a permutation p-value.

    Raises:
        TvLensError: fewer than two vectors, two tasks of one name, or as `similarity`.

    Examples:
        >>> other = dataclasses.replace(-vectors, task="another task")
        >>> tv.compare_tasks([vectors, other], layer=2).between < 0
        True
    """
    names, owners = _names_and_owners(vectors)
    cosines = torch.cat([torch.cat([similarity(a, b, layer) for b in vectors], dim=1) for a in vectors])
    return Similarities(layer, names, owners, cosines, vectors[0].n_layers)


@dataclass(frozen=True, eq=False, repr=False)
class VectorMap:
    """Vectors of several tasks laid out on a plane. What `map_vectors` returns.

    Attributes:
        layer: the layer.
        tasks: the tasks' names.
        owners: `points[i]` belongs to `tasks[owners[i]]`.
        points: two coordinates for each vector.
        axes: the names of the axes.
        n_layers: the number of the model's blocks.

    Examples:
        >>> tv.map_vectors([vectors], layer=2).tasks
        ('upper',)
    """

    layer: int
    tasks: tuple[str, ...]
    owners: tuple[int, ...]
    points: Float[Tensor, "vector 2"]
    axes: tuple[str, str]
    n_layers: int | None = None

    def to_pandas(self) -> pd.DataFrame:
        """One row per vector: task, and its coordinates (x, y)."""
        import pandas as pd

        x, y = self.points.T.tolist()
        return pd.DataFrame({"task": [self.tasks[owner] for owner in self.owners], "x": x, "y": y})

    def plot(self) -> go.Figure:
        """The map, with a color and a symbol for each task."""
        return figure(self)

    def __repr__(self) -> str:
        where = layer_label(self.layer, self.n_layers)
        return f"VectorMap({len(self.owners)} vectors of {len(self.tasks)} tasks, {where}: {', '.join(self.axes)})"

    def _repr_html_(self) -> str:
        return html_table(self.to_pandas(), f"{layer_label(self.layer, self.n_layers)}: {self.axes[0]}, {self.axes[1]}")


def pca(rows: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], tuple[str, str]]:
    """A layout for `map_vectors`: the two directions along which the vectors differ most (extra `maps`).

    Distances are those of the vectors, up to the share of the variance that the axes name.

    Args:
        rows: one vector in each.

    Returns:
        Two coordinates for each row, and a name for each axis.

    Raises:
        MissingExtraError: the extra `maps` is not installed.

    Examples:
        >>> points, axes = tv.pca(vectors.at(2).numpy())
        >>> points.shape
        (4, 2)
    """
    try:
        from sklearn.decomposition import PCA
    except ImportError as error:
        raise MissingExtraError(_MAPS) from error
    model = PCA(n_components=2, svd_solver="full")
    if not rows.var(axis=0).any():
        raise TvLensError(f"all {len(rows)} vectors are the same, so there is nothing to lay out; map other ones")
    points = model.fit_transform(rows)
    first, second = model.explained_variance_ratio_
    return points, (f"component 1 ({first:.0%} of the variance)", f"component 2 ({second:.0%})")


def tsne(*, perplexity: float | int = 15, seed: int = 0) -> Layout:
    """A layout for `map_vectors`: t-SNE (extra `maps`), which shows neighbors and says nothing about distances.

    Args:
        perplexity: about how many neighbors each vector has; less than the number of vectors.
        seed: the same seed gives the same result.

    Returns:
        A value for `method=`.

    Raises:
        TvLensError: a perplexity that is not less than the number of vectors, when the map is made.
        MissingExtraError: the extra `maps` is not installed, when the map is made.

    Examples:
        >>> layout = tv.map_vectors([vectors], layer=2, method=tv.tsne(perplexity=2))  # doctest: +SKIP
    """

    def lay(rows: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], tuple[str, str]]:
        if not 0 < perplexity < len(rows):
            raise TvLensError(
                f"perplexity is {perplexity:g} and there are {len(rows)} vectors; use less, or map more vectors"
            )
        try:
            from sklearn.manifold import TSNE
        except ImportError as error:
            raise MissingExtraError(_MAPS) from error
        model = TSNE(perplexity=perplexity, random_state=seed, init="pca", metric="cosine")
        return model.fit_transform(rows), ("t-SNE 1", "t-SNE 2")

    return lay


def map_vectors(vectors: Sequence[TaskVectors], layer: int, *, method: Layout = pca) -> VectorMap:
    """The vectors of all prompts at `layer` on a plane (Hendel et al. 2023, section 4, uses t-SNE).

    Args:
        vectors: those of each task's prompts; one entry for each task.
        layer: the layer whose vectors are laid out.
        method: `pca`, or what `tsne(perplexity=..., seed=...)` returns.

    Returns:
        The map, which `plot()` draws.

    Raises:
        MissingExtraError: the extra `maps` is not installed.
        TvLensError: fewer than three vectors, two tasks of one name, vectors of different models, or a layer out of
            range.

    Examples:
        >>> tv.map_vectors([vectors], layer=2).points.shape
        torch.Size([4, 2])
    """
    names, owners = _names_and_owners(vectors)
    if len(owners) < 3:
        raise TvLensError(f"{len(owners)} vectors make no map; pass those of the prompts, not their mean")
    points, axes = method(torch.cat([each.at(layer) for each in vectors]).double().numpy())
    return VectorMap(layer, names, owners, torch.as_tensor(points, dtype=torch.float32), axes, vectors[0].n_layers)


def _names_and_owners(vectors: Sequence[TaskVectors]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The tasks' names, and for each vector the index of its task."""
    if isinstance(vectors, TaskVectors) or not all(isinstance(each, TaskVectors) for each in vectors):
        raise TvLensError("give a list of TaskVectors, one for each task")
    names = tuple(each.task for each in vectors)
    if sum(map(len, vectors)) < 2 or len(set(names)) < len(names):
        raise TvLensError(
            f"tasks are {list(names)}; give two vectors or more, each task once and under a different name"
        )
    for each in vectors:
        vectors[0].check_same_model(each)
        each.check_constant()
    return names, tuple(i for i, each in enumerate(vectors) for _ in range(len(each)))


def _mean(numbers: Tensor) -> float | None:
    return float(numbers.mean()) if numbers.numel() else None
