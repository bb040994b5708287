"""What a task vector is: numbers by prompt and layer, and where they come from."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from tv_lens.files import from_json, to_json, write_whole
from tv_lens.prompts import Template
from tv_lens.views.tables import to_html

if TYPE_CHECKING:
    import pandas as pd

# Raised when a file can no longer be read by the version before.
_FORMAT = 1

# What a file of vectors is called in a repository of the Hugging Face hub, unless told otherwise.
_HUB_FILE = "task_vectors.safetensors"


def versions() -> dict[str, str]:
    """The versions of what computes, for provenance."""
    return {name: version(name) for name in ("tv-lens", "transformer-lens", "transformers", "torch")}


@dataclass(frozen=True, repr=False, eq=False)
class TaskVectors:
    """One vector per prompt and layer, in the units of the model's residual stream, with their provenance.

    `values[i, l]` belongs to prompt `i` and the output of block `l`; float32, on the CPU. `prompts` are the
    texts they were read from (each with its own query), `substitutes` the queries asked instead, `method` how
    they came about, `prepend_bos` whether the model's texts began with a BOS token.

    Vectors of one model can be added, subtracted and multiplied by a number. What comes out names all that it
    was made of: `task` and `method` hold the formula, `prompts` and `substitutes` those of both sides, and what
    the sides do not share (a template, BOS) is None.

    >>> past = TaskVectors(torch.full((1, 2, 3), 1.0), "tiny", "past")
    >>> gerund = TaskVectors(torch.full((1, 2, 3), 4.0), "tiny", "gerund")
    >>> moved = past + 0.5 * (gerund - past)
    >>> moved.task, moved.values[0, 0, 0].item()
    ('past + (0.5 * (gerund - past))', 2.5)
    """

    values: Float[Tensor, "prompt layer d_model"]
    model: str
    task: str
    template: Template | None = None
    prompts: tuple[str, ...] = ()
    substitutes: tuple[tuple[str, ...], ...] = ()
    method: str = "extract"
    prepend_bos: bool | None = None
    versions: Mapping[str, str] = field(default_factory=versions)

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or not len(self.values):
            raise ValueError(
                f"values of shape {tuple(self.values.shape)} are no task vectors; expected (prompt, layer, d_model) "
                "with at least one prompt"
            )
        # A copy, so that nobody's later change in place reaches in here.
        object.__setattr__(self, "values", self.values.detach().to("cpu", torch.float32, copy=True))
        broken = (~self.values.isfinite()).any(dim=-1).nonzero()
        if len(broken):
            prompt, layer = broken[0].tolist()
            raise ValueError(
                f"the vector of prompt {prompt} at layer {layer} of {self.model} holds NaN or infinity (and "
                f"{len(broken) - 1} more do); a half-precision model may overflow, run it in float32 or bfloat16"
            )

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
        return self.values[:, layer].clone()

    def mean(self) -> TaskVectors:
        """One vector a layer, the average over prompts; it is written into every row it is used on."""
        return replace(self, values=self.values.mean(dim=0, keepdim=True), method=f"mean of {_term(self.method)}")

    def __add__(self, other: TaskVectors) -> TaskVectors:
        """Vector by vector; one alone, as `mean()` gives it, goes with each of the other side's.

        Raises:
            ValueError: vectors of another model, or another number of them.
        """
        return self._joined(other, "+") if isinstance(other, TaskVectors) else NotImplemented

    def __sub__(self, other: TaskVectors) -> TaskVectors:
        """As `+`, with the other side taken away."""
        return self._joined(other, "-") if isinstance(other, TaskVectors) else NotImplemented

    def __mul__(self, factor: float | int) -> TaskVectors:
        """Every vector `factor` times as long.

        Raises:
            ValueError: NaN or infinity.
        """
        if isinstance(factor, bool) or not isinstance(factor, (float, int)):
            return NotImplemented
        if not math.isfinite(factor):
            raise ValueError(f"{factor} times a vector is no vector; multiply by a finite number")
        return replace(
            self,
            values=self.values * factor,
            task=f"{factor} * {_term(self.task)}",
            method=f"{factor} * {_term(self.method)}",
        )

    __rmul__ = __mul__

    def __neg__(self) -> TaskVectors:
        """Every vector turned round: `-1 * vectors`."""
        return self * -1

    def _joined(self, other: TaskVectors, sign: str) -> TaskVectors:
        self.check_same_model(other)
        if len(self) != len(other) and 1 not in (len(self), len(other)):
            raise ValueError(
                f"{len(self)} and {len(other)} vectors cannot be paired; take as many prompts for both, or the "
                "mean() of one side"
            )
        # Each prompt once, with its substitutes, also where one side was read without any.
        read = list(
            dict.fromkeys(pair for each in (self, other) for pair in zip(each.prompts, _rows(each), strict=True))
        )
        return TaskVectors(
            self.values + other.values if sign == "+" else self.values - other.values,
            model=self.model,
            task=f"{_term(self.task)} {sign} {_term(other.task)}",
            template=self.template if self.template == other.template else None,
            prompts=tuple(prompt for prompt, _ in read),
            substitutes=tuple(queries for _, queries in read) if self.substitutes or other.substitutes else (),
            method=f"{_term(self.method)} {sign} {_term(other.method)}",
            prepend_bos=self.prepend_bos if self.prepend_bos == other.prepend_bos else None,
            versions={name: _both(name, self.versions, other.versions) for name in {**self.versions, **other.versions}},
        )

    def to_pandas(self) -> pd.DataFrame:
        """A row for each vector: prompt (its number), layer, depth (the fraction of the model's blocks that have
        been run), and norm, the vector's length.
        """
        import pandas as pd

        layers = list(range(self.n_layers)) * len(self)
        return pd.DataFrame(
            {
                "prompt": [i for i in range(len(self)) for _ in range(self.n_layers)],
                "layer": layers,
                "depth": [depth(layer, self.n_layers) for layer in layers],
                "norm": self.values.norm(dim=-1).flatten().tolist(),
            }
        )

    def _repr_html_(self) -> str:
        import pandas as pd

        told = {
            "task": self.task,
            "model": self.model,
            "vectors": f"{len(self)}, of {self.n_layers} layers and d_model {self.d_model}",
            "method": self.method,
            "read from": f"{len(self.prompts)} prompts, {sum(map(len, self.substitutes))} substitute queries",
            "template": "" if self.template is None else repr(self.template.example),
            "BOS": {True: "prepended", False: "not prepended", None: ""}[self.prepend_bos],
            "versions": ", ".join(f"{name} {number}" for name, number in self.versions.items()),
        }
        return to_html(pd.DataFrame({"": told.keys(), "value": told.values()}), "task vectors")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with all provenance as JSON in its header, whole or not at all.

        Raises:
            OSError: the folder is missing or cannot be written to.
        """
        write_whole(path, self._content())

    def _content(self) -> bytes:
        provenance = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "values"}
        provenance["template"] = None if self.template is None else asdict(self.template)
        provenance["versions"] = dict(self.versions)
        header = {"format": _FORMAT, **provenance}
        header["sha256"] = _digest(header, self.values)
        # One entry: safetensors would write several in another order each time.
        metadata = {"tv_lens": to_json(header).decode()}
        return safetensors.torch.save({"values": self.values.contiguous()}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> TaskVectors:
        """Read what `save` wrote, bit for bit. Nothing in the file is executed.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: another kind of file, a damaged one, or one of a newer version of tv_lens.
        """
        path = Path(path)
        if path.is_dir():
            raise IsADirectoryError(f"{path}: a folder, not a file of task vectors")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of task vectors")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata, names = file.metadata() or {}, list(file.keys())
                values = file.get_tensor("values") if "values" in names else None
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file, or cut short ({error})") from error
        if "tv_lens" not in metadata or values is None:
            raise ValueError(f"{path}: a safetensors file, but not one of task vectors (it holds {names})")
        try:
            header = from_json(metadata["tv_lens"])
            provenance = _provenance(header)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: its header has been changed and cannot be read ({error})") from error
        if isinstance(provenance, int):
            raise ValueError(
                f"{path}: written in format {provenance} by a newer tv_lens; this one reads up to "
                f"{_FORMAT}, so upgrade it"
            )
        if values.dtype != torch.float32 or values.ndim != 3:
            raise ValueError(f"{path}: holds {values.dtype} of shape {tuple(values.shape)}, not task vectors")
        # Files of before the digest have none, nor has a header that was changed on purpose.
        if header.get("sha256") not in (None, _digest(header, values)):
            raise ValueError(f"{path}: damaged, as it does not fit its own checksum; copy or extract it again")
        try:
            return cls(values, **provenance)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def push_to_hub(
        self,
        repo_id: str,
        filename: str = _HUB_FILE,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Put the file that `save` writes into a repository of the Hugging Face hub, which is made where there is
        none, and give its commit's address. `token` is by default the one of `hf auth login`.

        Raises:
            OSError: the hub refuses (huggingface_hub's HfHubHTTPError), or HF_HUB_OFFLINE is set.
            Exception: where the hub cannot be reached, that of huggingface_hub's HTTP client.
        """
        from huggingface_hub import HfApi

        hub = HfApi(token=token)
        hub.create_repo(repo_id, private=private, exist_ok=True)
        commit = hub.upload_file(
            path_or_fileobj=self._content(),
            path_in_repo=filename,
            repo_id=repo_id,
            revision=revision,
            commit_message=f"Task vectors of {self.task}, {self.model}",
        )
        return str(commit.commit_url)

    @classmethod
    def from_hub(
        cls, repo_id: str, filename: str = _HUB_FILE, *, revision: str | None = None, token: str | None = None
    ) -> TaskVectors:
        """Read what `push_to_hub` wrote, by `load`, from the hub or from the copy kept of an earlier download.

        Raises:
            OSError: no such repository or file, or the hub cannot be reached; the message is huggingface_hub's.
            ValueError: as `load`.
        """
        from huggingface_hub import hf_hub_download

        return cls.load(hf_hub_download(repo_id, filename, revision=revision, token=token))

    def check_same_model(self, other: TaskVectors) -> None:
        """Raises ValueError where the others were read from another model: each has a residual stream of its own."""
        if self.model != other.model or self.values.shape[1:] != other.values.shape[1:]:
            raise ValueError(
                f"vectors of {self.model} ({self.n_layers} layers, d_model {self.d_model}) and of {other.model} "
                f"({other.n_layers} layers, d_model {other.d_model}) do not go together: each model has a residual "
                "stream of its own; extract both from one model"
            )

    def check_fits(self, model: str, n_layers: int, d_model: int) -> None:
        """Raises ValueError where the vectors cannot be of that model: another depth or another width."""
        if (self.n_layers, self.d_model) != (n_layers, d_model):
            raise ValueError(
                f"these vectors were read from {self.model} ({self.n_layers} layers, d_model {self.d_model}) and "
                f"{model} has {n_layers} layers, d_model {d_model}; extract them from the model they are used on"
            )


def _provenance(header: Any) -> dict[str, Any] | int:
    """The fields in a file's header, each of its type; or the header's format, where that is a newer one."""
    if type(header["format"]) is not int or header["format"] < 1:
        raise ValueError("format is a whole number")
    if header["format"] > _FORMAT:
        return header["format"]
    if not isinstance(header["versions"], dict):
        raise ValueError("versions is an object")
    template, bos = header["template"], header["prepend_bos"]
    if not all(isinstance(header[name], str) for name in ("model", "task", "method")):
        raise ValueError("model, task and method are texts")
    if not (bos is None or isinstance(bos, bool)):
        raise ValueError("prepend_bos is true, false or null")
    lists = (header["prompts"], header["substitutes"], *header["substitutes"])
    if not all(isinstance(each, list) for each in lists):
        raise ValueError("prompts and substitutes are lists")
    prompts, substitutes = tuple(header["prompts"]), tuple(map(tuple, header["substitutes"]))
    if template is not None and not all(isinstance(template[name], str) for name in ("example", "separator")):
        raise ValueError("template holds texts")
    texts = [*prompts, *(query for queries in substitutes for query in queries), *header["versions"].values()]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("prompts, substitutes and versions hold texts")
    return {
        **{name: header[name] for name in ("model", "task", "method", "prepend_bos", "versions")},
        "template": None if template is None else Template(template["example"], template["separator"]),
        "prompts": prompts,
        "substitutes": substitutes,
    }


def _digest(header: Mapping[str, Any], values: Float[Tensor, "prompt layer d_model"]) -> str:
    """What tells whether the numbers or their provenance were damaged on the way."""
    numbers = values.contiguous().view(torch.uint8).numpy().tobytes()
    told = {name: value for name, value in header.items() if name != "sha256"}
    return hashlib.sha256(to_json([told, list(values.shape)]) + numbers).hexdigest()


def depth(layer: int, n_layers: int) -> float:
    """How far up the model the output of block `layer` is: the fraction of the blocks that have been run."""
    return (layer + 1) / n_layers


def place(layer: int, n_layers: int | None) -> str:
    """The layer in words, with its depth where the model's is known."""
    return f"layer {layer}" + ("" if n_layers is None else f" (depth {depth(layer, n_layers):.2f})")


def _term(text: str) -> str:
    """A formula as part of a larger one."""
    return f"({text})" if re.search(r" [-+*] ", text) else text


def _both(name: str, one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """The version of a package, or all that are known."""
    return " and ".join(
        dict.fromkeys(number for each in (one, other) if name in each for number in each[name].split(" and "))
    )


def _rows(vectors: TaskVectors) -> tuple[tuple[str, ...], ...]:
    return vectors.substitutes or ((),) * len(vectors.prompts)


def check_layer(layer: int, n_layers: int, model: str) -> None:
    """Raises ValueError where `model` has no such layer."""
    if isinstance(layer, bool) or not hasattr(layer, "__index__") or not 0 <= layer < n_layers:
        raise ValueError(f"layer {layer} is not one of {model}: layer l is the output of block l, 0 to {n_layers - 1}")
