"""The settings of an experiment: everything it takes to repeat it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tv_lens.errors import TvLensError
from tv_lens.prompts import PromptFormat, format_from_dict
from tv_lens.provenance import Option
from tv_lens.tasks.describe import some

# The settings that are shown first.
_SHOWN = ("model", "method", "shots", "n_train", "n_dev", "n_test", "seed", "scoring", "max_new_tokens")
# The settings that tell the rows of several experiments apart.
IDENTIFYING = ("model", "scoring", "method", "shots", "seed")


@dataclass(frozen=True, repr=False)
class Settings:
    """What an experiment was run with. Fields can be read by name (`settings["shots"]`), too. The options of
    `run_experiment` are among them under their names; the others are below.

    Attributes:
        model: the model's name.
        engine: the kind of engine.
        weights: a fingerprint of the model, its configuration and the user's hooks.
        dtype: the model's precision.
        n_layers: the number of blocks.
        d_model: the width of the residual stream.
        prepend_bos: whether a BOS token is put in front.
        bos: that token.
        data: a fingerprint of each task's pairs.
        rules: the rules' names.
        method: joins the names of `methods`, which hold the options of each.
        scoring: "full answer" or "first token".
        versions: of the packages.
        n_train: without it the vectors are made from the dev prompts.
        measured: whether log-probabilities and divergences are there.
        controls_choose: whether every control chose its own layer (it did not in 0.1).

    Examples:
        >>> experiment.settings["shots"], experiment.settings.scoring
        (2, 'first token')
    """

    model: str
    engine: str
    weights: str | None
    dtype: str
    n_layers: int
    d_model: int
    prepend_bos: bool | None
    bos: str | None
    tasks: tuple[str, ...]
    data: Mapping[str, str]
    rules: Mapping[str, str]
    shots: int
    n_dev: int
    n_test: int
    seed: int
    method: str
    methods: Mapping[str, dict[str, Option]]
    substitutes: int
    controls: tuple[str, ...]
    template: dict[str, Any]
    max_new_tokens: int
    scoring: str
    layers: tuple[int, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    n_train: int | None = None
    strengths: tuple[float, ...] = (1.0,)
    conditions: tuple[str, ...] = ()
    measured: bool = False
    controls_choose: bool = False

    def __post_init__(self) -> None:
        if not self.tasks or not self.methods:
            raise TvLensError("an experiment has at least one task and one method")
        if not self.n_layers > 0 or not all(0 <= layer < self.n_layers for layer in self.layers):
            raise TvLensError(f"layers {self.layers[:12]} are not those of a model with {self.n_layers} layers")
        if set(self.tasks) - set(self.data) or set(self.tasks) - set(self.rules):
            raise TvLensError("each task has a fingerprint of its data, and a rule")

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={self[name]!r}" for name in _SHOWN)
        return f"Settings({shown}, {len(self.tasks)} tasks: {some(self.tasks)}, ...)"

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> list[str]:
        """The names of the settings."""
        return [each.name for each in fields(self)]

    @property
    def format(self) -> PromptFormat:
        """The prompt format that `template` describes."""
        return format_from_dict(self.template)

    def differences(self, other: Settings) -> list[str]:
        """What differs in `other`, one sentence for each setting.

        Args:
            other: the settings of another run.

        Returns:
            What differs in `other`, one sentence for each setting.
        """
        return [f"{name} was {self[name]}, is {other[name]}" for name in self.keys() if self[name] != other[name]]
