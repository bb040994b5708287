"""What a task vector is: numbers by prompt and layer, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version

from jaxtyping import Float
from torch import Tensor

from tv_lens.prompts import Template


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("tv-lens", "transformer-lens", "transformers", "torch")}


@dataclass(frozen=True, repr=False, eq=False)
class TaskVectors:
    """One vector per prompt and layer, in the units of the model's residual stream, with their provenance.

    `values[i, l]` belongs to prompt `i` and the output of block `l`; float32, on the CPU. `prompts` are the
    texts they were read from (each with its own query), `substitutes` the queries asked instead, `method` how
    they came about, `prepend_bos` whether the model's texts began with a BOS token.
    """

    values: Float[Tensor, "prompt layer d_model"]
    model: str
    task: str
    template: Template | None = None
    prompts: tuple[str, ...] = ()
    substitutes: tuple[tuple[str, ...], ...] = ()
    method: str = "extract"
    prepend_bos: bool | None = None
    versions: Mapping[str, str] = field(default_factory=_versions)

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or not len(self.values):
            raise ValueError(
                f"values of shape {tuple(self.values.shape)} are no task vectors; expected (prompt, layer, d_model) "
                "with at least one prompt"
            )
        object.__setattr__(self, "values", self.values.detach().float().cpu())

    def __len__(self) -> int:
        return self.values.shape[0]

    def __repr__(self) -> str:
        return (
            f"TaskVectors({self.task!r} of {self.model}: {len(self)} prompts, {self.n_layers} layers, "
            f"d_model {self.d_model}, {self.method})"
        )

    @property
    def n_layers(self) -> int:
        """How many layers of the model they cover: all of them."""
        return self.values.shape[1]

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.values.shape[2]

    def at(self, layer: int) -> Float[Tensor, "prompt d_model"]:
        """The vectors at the output of block `layer`.

        Raises:
            ValueError: no such layer; negative ones do not count from the end.
        """
        check_layer(layer, self.n_layers, self.model)
        return self.values[:, layer]

    def mean(self) -> TaskVectors:
        """One vector a layer, the average over prompts; it is written into every row it is used on."""
        return replace(self, values=self.values.mean(dim=0, keepdim=True), method=f"mean of {self.method}")

    def check_fits(self, model: str, n_layers: int, d_model: int) -> None:
        """Raises ValueError where the vectors cannot be of that model: another depth or another width."""
        if (self.n_layers, self.d_model) != (n_layers, d_model):
            raise ValueError(
                f"these vectors were read from {self.model} ({self.n_layers} layers, d_model {self.d_model}) and "
                f"{model} has {n_layers} layers, d_model {d_model}; extract them from the model they are used on"
            )


def check_layer(layer: int, n_layers: int, model: str) -> None:
    """Raises ValueError where `model` has no such layer."""
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer {layer} is not one of {model}: layer l is the output of block l, 0 to {n_layers - 1}")
