"""How far a training is: what a file keeps of it, so that it can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tv_lens.errors import TvLensError
from tv_lens.files import from_json, read_whole, to_json, typed, write_whole
from tv_lens.tensor_files import TensorFile

_FILE = TensorFile("tv_lens_learning", "training", format=1)


class Epoch(NamedTuple):
    """What was measured for one layer after an epoch (0: before training).

    `loss` is the mean over the training prompts while they were trained on, None in epoch 0. `validation_loss` and
    `validation_accuracy` are None without validation prompts. Losses are in nats.
    """

    epoch: int
    layer: int
    loss: float | None
    validation_loss: float | None
    validation_accuracy: float | None


@dataclass
class Progress:
    """The vectors after so many epochs, the optimizer's state, and the best vectors so far."""

    vectors: Float[Tensor, "layer width"]
    first_moments: Float[Tensor, "layer width"]
    second_moments: Float[Tensor, "layer width"]
    best: Float[Tensor, "layer width"]
    epochs: int = 0
    curve: list[Epoch] = field(default_factory=list)

    @staticmethod
    def start(vectors: Float[Tensor, "layer width"]) -> Progress:
        """Before the first epoch."""
        zeros = torch.zeros_like(vectors)
        return Progress(vectors.clone(), zeros, zeros.clone(), vectors.clone())

    def save(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Write everything, with the settings of the training."""
        header = _Header(dict(settings), self.epochs, self.curve)
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        write_whole(path, _FILE.pack(asdict(header), tensors))

    @staticmethod
    def load(path: Path, settings: Mapping[str, Any]) -> Progress:
        """Read what `save` wrote for the same settings.

        Raises:
            TvLensError: another kind of file, a damaged one, or one of a training with other settings.
        """
        try:
            raw, tensors = _FILE.unpack(read_whole(path))
            header = typed(raw, _Header)
        except TvLensError as error:
            raise TvLensError(f"{path}: not a file of a training, or a damaged one ({error}); delete it") from error
        given = typed_settings(settings)
        differing = [name for name in given if header.settings.get(name) != given[name]]
        if differing:
            raise TvLensError(
                f"{path}: a training with other settings ({', '.join(differing)}); use another file, or delete it"
            )
        known: dict[str, Any] = {**tensors, **vars(header)}
        del known["settings"]
        return Progress(**known)


def typed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as they come back from a file."""
    loaded: dict[str, Any] = from_json(to_json(dict(settings)))
    return loaded


@dataclass(frozen=True)
class _Header:
    """The JSON in a file's header, with its types."""

    settings: dict[str, Any]
    epochs: int
    curve: list[Epoch]
