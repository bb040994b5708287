"""What a task vector is: numbers by prompt and layer, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tv_lens.control_vectors import Source, Vector, export, imported, load
from tv_lens.display import html_table
from tv_lens.edits import RESID_POST, Head, LinearMap, Op, Site, Usage, Write
from tv_lens.errors import TvLensError
from tv_lens.files import write_whole
from tv_lens.prompts import PromptFormat
from tv_lens.provenance import Option, Provenance, Term, merged_versions, versions
from tv_lens.vector_files import HUB_FILE, Content, download, encode, read, upload

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


@dataclass(frozen=True, repr=False, eq=False)
class LinearMaps:
    """For each layer a linear function of the activation, which is added together with the vector: x -> (x inward^T)
    outward.

    Attributes:
        inward: the first factor.
        outward: the second factor.
        lengths: the mean lengths of all that is added, on the prompts that it was made of.

    Examples:
        >>> tv.linear_vector(model, prompts).maps.outward.shape
        torch.Size([4, 4, 32])
    """

    inward: Float[Tensor, "layer rank width"]
    outward: Float[Tensor, "layer rank width"]
    lengths: Float[Tensor, " layer"]

    def at(self, index: int) -> LinearMap:
        """The function of the layer with this index in the vectors' `layers`.

        Args:
            index: a number in the vectors' `layers`.

        Returns:
            The function of that layer.
        """
        return LinearMap(self.inward[index], self.outward[index])


@dataclass(frozen=True, repr=False, eq=False)
class TaskVectors:
    """One vector per prompt and layer, with their provenance.

    They can be indexed and iterated by prompt, and passed to `torch.as_tensor` and `numpy.asarray`. Vectors of one
    model can be added, subtracted, multiplied and divided by a number. The result names everything it was made of:
    `task` and `method` hold the formula, `prompts` and `substitutes` those of both sides, and what the sides do not
    share (a template, BOS) is None.

    Attributes:
        values: `values[i, j]` belongs to prompt `i` and layer `layers[j]`; float32, on the CPU, in the units of the
            `site` they are written to. At a per-head site the outputs of `n_heads` heads come one after the other.
        model: the model's name.
        task: the task's name, or a formula.
        template: how the prompts were written.
        prompts: the texts they were read from.
        substitutes: the queries asked instead.
        method: how they were made.
        prepend_bos: the setting that was used.
        versions: of the packages.
        site: what they are written to.
        op: how they are meant to be written: hidden states overwrite ("set"), differences and learned vectors are added
            ("add").
        layers: every layer, unless the method made vectors for some only.
        n_layers: the number of the model's blocks.
        options: the method's options.
        bos: the token in front of every text.
        terms: what was added up, with its factors.
        n_heads: the number of heads at a per-head site.
        heads: the (layer, head) pairs that are written, if not all; the others are left as they are.
        usage: at which positions, at which steps and with which strength they are meant to be written.
        maps: a linear function of the activation that is added as well (`linear_vector`).

    Raises:
        TvLensError: values of another shape, NaN or infinity, or layers that do not fit them.

    Examples:
        >>> past = TaskVectors(torch.full((1, 2, 3), 1.0), "tiny", "past")
        >>> gerund = TaskVectors(torch.full((1, 2, 3), 4.0), "tiny", "gerund")
        >>> moved = past + 0.5 * (gerund - past)
        >>> moved.task, moved.values[0, 0, 0].item()
        ('past + (0.5 * (gerund - past))', 2.5)
    """

    values: Float[Tensor, "prompt layer width"]
    model: str
    task: str
    template: PromptFormat | None = None
    prompts: tuple[str, ...] = ()
    substitutes: tuple[tuple[str, ...], ...] = ()
    method: str = "extract"
    prepend_bos: bool | None = None
    versions: Mapping[str, str] = field(default_factory=versions)
    site: Site = field(default=RESID_POST, kw_only=True)
    op: Op = field(default="set", kw_only=True)
    layers: tuple[int, ...] = field(default=(), kw_only=True)
    n_layers: int = field(default=0, kw_only=True)
    options: Mapping[str, Option] = field(default_factory=dict, kw_only=True)
    bos: str | None = field(default=None, kw_only=True)
    terms: tuple[Term, ...] = field(default=(), kw_only=True)
    n_heads: int = field(default=0, kw_only=True)
    heads: tuple[Head, ...] = field(default=(), kw_only=True)
    usage: Usage = field(default=Usage(), kw_only=True)
    maps: LinearMaps | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or not len(self.values):
            raise TvLensError(
                f"values of shape {tuple(self.values.shape)} are not task vectors; expected (prompt, layer, width) "
                "with at least one prompt"
            )
        # Copy, so that later in-place changes do not affect this object.
        object.__setattr__(self, "values", self.values.detach().to("cpu", torch.float32, copy=True))
        if not self.layers:
            object.__setattr__(self, "layers", tuple(range(self.values.shape[1])))
        if not self.n_layers:
            object.__setattr__(self, "n_layers", max(self.layers, default=-1) + 1)
        if not self.terms:
            object.__setattr__(self, "terms", (Term(1.0, self.task, self.method),))
        distinct = len(set(self.layers)) == len(self.layers) == self.values.shape[1] > 0
        if not (distinct and all(0 <= layer < self.n_layers for layer in self.layers)):
            raise TvLensError(
                f"{self.values.shape[1]} layers of values for the layers {_short_list(self.layers)} of "
                f"{self.n_layers}; give each layer's number once"
            )
        object.__setattr__(self, "heads", tuple(Head(*pair) for pair in self.heads))
        if self.heads:
            check_heads(self.heads, self.layers, self.n_heads, self.model)
        if self.maps is not None:
            self._check_maps(self.maps)
        if set(self.usage.tried) - set(self.layers):
            raise TvLensError(f"layers {_short_list(self.usage.tried)} are tried, and some of them have no vector")
        broken = (~self.values.isfinite()).any(dim=-1).nonzero()
        if len(broken):
            prompt, index = broken[0].tolist()
            raise TvLensError(
                f"the vector of prompt {prompt} at layer {self.layers[index]} of {self.model} holds NaN or infinity "
                f"(and {len(broken) - 1} more do); a half-precision model may overflow, run it in float32 or bfloat16"
            )

    def _check_maps(self, maps: LinearMaps) -> None:
        expected = (len(self.layers), *maps.inward.shape[1:2], self.width)
        fits = maps.inward.shape == maps.outward.shape == expected and maps.lengths.shape == (len(self.layers),)
        if not fits or maps.inward.ndim != 3 or self.op != "add" or self.heads:
            raise TvLensError(
                f"linear maps of shapes {tuple(maps.inward.shape)} and {tuple(maps.outward.shape)} for "
                f"{len(self.layers)} layers of width {self.width}, op {self.op!r}; they are added, one for each layer"
            )
        if not all(bool(each.isfinite().all()) for each in (maps.inward, maps.outward, maps.lengths)):
            raise TvLensError(f"the linear maps of {self.task!r} hold NaN or infinity")

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, chosen: SupportsIndex | slice | Sequence[int] | Tensor) -> TaskVectors:
        """The vectors of some of the prompts, as task vectors; a negative number counts from the last prompt.

        Raises:
            IndexError: a prompt that the vectors do not have.
            TvLensError: vectors that belong to positions and cannot be chosen from, or none left.
        """
        if self.usage.per_position:
            raise TvLensError(
                f"{self!r} has a vector for each position, and these are used together; its `values` are a tensor"
            )
        rows: list[int] = torch.arange(len(self), device="cpu")[chosen].reshape(-1).tolist()
        if not rows:
            raise TvLensError(f"no vector of {self!r} is left by [{chosen!r}]")
        read = rows if len(self.prompts) == len(self) else range(len(self.prompts))
        return replace(
            self,
            values=self.values[rows],
            prompts=tuple(self.prompts[row] for row in read),
            substitutes=tuple(self.substitutes[row] for row in read) if self.substitutes else (),
        )

    def __iter__(self) -> Iterator[TaskVectors]:
        """The vectors of one prompt after the other."""
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """`numpy.asarray(vectors)`: a copy of `values`."""
        return self.values.numpy().copy() if dtype is None else self.values.numpy().astype(dtype)

    def __dlpack__(self, **options: Any) -> Any:
        """`torch.as_tensor(vectors)`: a copy of `values`."""
        return self.values.clone().__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[Any, int]:
        return self.values.__dlpack_device__()

    def __repr__(self) -> str:
        site = "" if self.site == RESID_POST else f", {self.site}"
        return (
            f"TaskVectors({self.task!r} of {self.model}: {len(self)} prompts, {len(self.layers)} layers, "
            f"d_model {self.width}, {self.method}{site})"
        )

    @property
    def by_head(self) -> Float[Tensor, "prompt layer head d_head"]:
        """The vectors of a per-head site, one for each head.

        Raises:
            TvLensError: vectors of another site.
        """
        if not self.n_heads:
            raise TvLensError(f"{self!r} holds no outputs of heads; read_heads(model, prompts) reads them")
        return rearrange(
            self.values, "prompt layer (head d_head) -> prompt layer head d_head", head=self.n_heads
        ).clone()

    @property
    def written(self) -> Float[Tensor, "layer width"]:
        """1 at the components that are written, 0 at those of heads that are not in `heads`."""
        written = torch.full(self.values.shape[1:], float(not self.heads), dtype=torch.float32, device="cpu")
        for layer, head in self.heads:
            width = self.width // self.n_heads
            written[self.layers.index(layer), head * width : (head + 1) * width] = 1
        return written

    @property
    def write(self) -> Write:
        """How the vectors are meant to be written."""
        return Write(self.op, self.usage.strength, self.usage.every_step, self.usage.keep_norm)

    @property
    def tried_layers(self) -> tuple[int, ...]:
        """The layers among which a sweep looks for the best: those with a vector, unless `usage` says otherwise."""
        if self.usage.tried:
            return self.usage.tried
        return self.layers[-1:] if self.usage.span == "together" else self.layers

    def written_with(self, layer: int) -> tuple[int, ...]:
        """The layers that are written to if `layer` is named: itself, or several (see `Usage`).

        Args:
            layer: the layer that is named.

        Returns:
            The layers that are written to: itself, or several (see `Usage`).
        """
        if self.usage.span == "one":
            return (layer,)
        return tuple(sorted(each for each in self.layers if each <= layer or self.usage.span == "together"))

    @property
    def width(self) -> int:
        """The length of a vector: d_model, or n_heads * d_head for the heads' outputs."""
        return self.values.shape[2]

    @property
    def d_model(self) -> int:
        """The width of the residual stream; `width` under its usual name."""
        return self.width

    @property
    def provenance(self) -> Provenance:
        """Where the vectors come from."""
        return Provenance(
            model=self.model,
            task=self.task,
            method=self.method,
            options=self.options,
            template=self.template,
            prompts=self.prompts,
            substitutes=self.substitutes,
            prepend_bos=self.prepend_bos,
            bos=self.bos,
            versions=self.versions,
            terms=self.terms,
        )

    def at(self, layer: int) -> Float[Tensor, "prompt width"]:
        """The vectors for the output of block `layer`.

        Args:
            layer: the layer's number.

        Returns:
            The vectors for the output of that block.

        Raises:
            TvLensError: no such layer (negative numbers do not count from the end), or none was made for it.
        """
        check_layer(layer, self.n_layers, self.model)
        if layer not in self.layers:
            raise TvLensError(f"{self!r} has no vector for layer {layer}, only for {_short_list(self.layers)}")
        return self.values[:, self.layers.index(layer)].clone()

    def check_constant(self) -> None:
        """Raise TvLensError if what is written depends on the prompt, so that there is no vector to look at.

        Raises:
            TvLensError: what is written depends on the prompt, so that there is no vector to look at.
        """
        if self.maps is not None:
            raise TvLensError(
                f"{self!r} depends on the prompt that it is written into, and its values are only the intercept of a "
                "linear function; look at other vectors"
            )

    def mean(self) -> TaskVectors:
        """One vector per layer, the average over prompts. It is written into every row it is used on.

        Vectors that belong to positions, and not to prompts, are returned as they are.
        """
        if self.usage.per_position:
            return self
        return replace(
            self,
            values=self.values.mean(dim=0, keepdim=True),
            method=f"mean of {self._term(self.method)}",
            terms=tuple(replace(term, method=f"mean of {term.method}") for term in self.terms),
        )

    def __add__(self, other: TaskVectors) -> TaskVectors:
        """Vector by vector; a single vector, as `mean()` gives it, is paired with each of the other side's.

        Raises:
            TvLensError: vectors of another model or site, or another number of them.
        """
        return self._sum(other, 1) if isinstance(other, TaskVectors) else NotImplemented

    def __sub__(self, other: TaskVectors) -> TaskVectors:
        """As `+`, with the other side subtracted."""
        return self._sum(other, -1) if isinstance(other, TaskVectors) else NotImplemented

    def __mul__(self, factor: float | int) -> TaskVectors:
        """Every vector `factor` times as long.

        Raises:
            TvLensError: NaN or infinity.
        """
        if isinstance(factor, bool) or not isinstance(factor, (float, int)):
            return NotImplemented
        if not math.isfinite(factor):
            raise TvLensError(f"{factor} times a vector is not a vector; multiply by a finite number")
        maps, usage, scale = self.maps, self.usage, float(factor)
        if self.op == "rotate":  # only the direction of these vectors counts
            usage, scale = replace(usage, strength=usage.strength * abs(factor)), math.copysign(1.0, factor)
        if maps is not None:
            maps = replace(maps, outward=maps.outward * factor, lengths=maps.lengths * abs(factor))
        return replace(
            self,
            values=self.values * scale,
            maps=maps,
            usage=usage,
            task=f"{factor} * {self._term(self.task)}",
            method=f"{factor} * {self._term(self.method)}",
            terms=tuple(replace(term, factor=term.factor * factor) for term in self.terms),
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | int) -> TaskVectors:
        """Every vector divided by a number.

        Raises:
            TvLensError: 0, NaN or infinity.
        """
        if isinstance(divisor, bool) or not isinstance(divisor, (float, int)):
            return NotImplemented
        if not divisor or not math.isfinite(divisor):
            raise TvLensError(f"a vector divided by {divisor} is not a vector; divide by a finite number other than 0")
        return self * (1 / divisor)

    def __neg__(self) -> TaskVectors:
        """The negated vectors: `-1 * vectors`."""
        return self * -1

    def _sum(self, other: TaskVectors, sign: int) -> TaskVectors:
        self.check_same_model(other)
        if self.maps is not None or other.maps is not None:
            raise TvLensError("linear vectors depend on the prompt and cannot be summed; multiply them, or sum others")
        usages = [replace(each.usage, tried=()) for each in (self, other)]
        if usages[0] != usages[1]:
            raise TvLensError(
                f"{self.task!r} and {other.task!r} are meant to be written in different ways, {usages[0]} and "
                f"{usages[1]}; give one the usage of the other first: dataclasses.replace(b, usage=a.usage)"
            )
        if len(self) != len(other) and 1 not in (len(self), len(other)):
            raise TvLensError(
                f"{len(self)} and {len(other)} vectors cannot be paired; take as many prompts for both, or the "
                "mean() of one side"
            )
        symbol = "+" if sign > 0 else "-"
        read = dict.fromkeys([*self._reads(), *other._reads()])  # each prompt once, with its substitutes
        has_substitutes = bool(self.substitutes or other.substitutes)
        return replace(
            self,
            values=self.values + sign * other.values,
            task=f"{self._term(self.task)} {symbol} {other._term(other.task)}",
            template=self.template if self.template == other.template else None,
            prompts=tuple(prompt for prompt, _ in read),
            substitutes=tuple(queries for _, queries in read) if has_substitutes else (),
            method=f"{self._term(self.method)} {symbol} {other._term(other.method)}",
            prepend_bos=self.prepend_bos if self.prepend_bos == other.prepend_bos else None,
            versions=merged_versions(self.versions, other.versions),
            op=self.op if self.op == other.op else "add",
            usage=self.usage if self.usage == other.usage else usages[0],
            options=self.options if self.options == other.options else {},
            bos=self.bos if self.bos == other.bos else None,
            terms=self.terms + tuple(replace(term, factor=sign * term.factor) for term in other.terms),
        )

    def _term(self, text: str) -> str:
        """A formula as part of a larger one: in parentheses if the vectors are a sum or a multiple."""
        is_formula = len(self.terms) > 1 or self.terms[0].factor != 1
        return f"({text})" if is_formula else text

    def _reads(self) -> list[tuple[str, tuple[str, ...]]]:
        substitutes = self.substitutes or ((),) * len(self.prompts)
        return list(zip(self.prompts, substitutes, strict=True))

    def to_pandas(self) -> pd.DataFrame:
        """One row per vector: prompt (its number), layer, depth (the fraction of the model's blocks that have been
        run), and norm, the vector's length.
        """
        import pandas as pd

        return pd.DataFrame(
            {
                "prompt": [i for i in range(len(self)) for _ in self.layers],
                "layer": list(self.layers) * len(self),
                "depth": [depth(layer, self.n_layers) for layer in self.layers] * len(self),
                "norm": self.values.norm(dim=-1).flatten().tolist(),
            }
        )

    def _repr_html_(self) -> str:
        import pandas as pd

        bos = {True: "prepended", False: "not prepended", None: ""}[self.prepend_bos]
        layers = (
            f"{self.n_layers} layers" if len(self.layers) == self.n_layers else f"layers {_short_list(self.layers)}"
        )
        rows = {
            "task": self.task,
            "model": self.model,
            "vectors": f"{len(self)}, of {layers} and d_model {self.width}",
            "site": f"{self.site}, {_WRITTEN[self.op]}{self._usage_text()}",
            "method": self.method,
            "read from": f"{len(self.prompts)} prompts, {sum(map(len, self.substitutes))} substitute queries",
            "template": "" if self.template is None else repr(self.template),
            "BOS": f"{bos} ({self.bos!r})" if self.bos else bos,
            "versions": ", ".join(f"{name} {number}" for name, number in self.versions.items()),
        }
        return html_table(pd.DataFrame({"": rows.keys(), "value": rows.values()}), "task vectors")

    def _usage_text(self) -> str:
        """What is unusual about how the vectors are meant to be written."""
        default = Usage()
        differing = {name: value for name, value in vars(self.usage).items() if value != vars(default)[name]}
        if self.maps is not None:
            differing["rank"] = self.maps.inward.shape[1]
        return "".join(f", {name} {value}" for name, value in differing.items())

    def save(self, path: str | Path, *, notes: Mapping[str, float] | None = None) -> None:
        """Write a safetensors file with the provenance as JSON in its header, whole or not at all.

        Args:
            path: where to write.
            notes: numbers to keep beside the vectors, such as what making them took; `load` ignores them.

        Raises:
            OSError: the folder is missing or cannot be written to.
            TvLensError: a custom prompt format that cannot be saved.
        """
        write_whole(path, encode(self._content(), notes))

    def _content(self) -> Content:
        layout = (self.site, self.op, self.layers, self.n_layers, self.n_heads, self.heads, self.usage)
        maps = self.maps
        factors = {} if maps is None else {"inward": maps.inward, "outward": maps.outward, "lengths": maps.lengths}
        return Content(self.values, self.provenance, *layout, maps=factors)

    @classmethod
    def load(cls, path: str | Path) -> TaskVectors:
        """Read what `save` wrote, bit for bit. Nothing in the file is executed.

        Args:
            path: the file.

        Returns:
            The vectors.

        Raises:
            FileNotFoundError: there is no such file.
            TvLensError: another kind of file, a damaged one, or one of a newer version of tv_lens.
        """
        content = read(Path(path))
        try:
            return cls._of(content)
        except TvLensError as error:
            raise TvLensError(f"{path}: {error}") from error

    @classmethod
    def _of(cls, content: Content) -> TaskVectors:
        source = content.provenance
        return cls(
            content.values,
            model=source.model,
            task=source.task,
            template=source.template,
            prompts=source.prompts,
            substitutes=source.substitutes,
            method=source.method,
            prepend_bos=source.prepend_bos,
            versions=source.versions,
            site=content.site,
            op=content.op,
            layers=content.layers,
            n_layers=content.n_layers,
            options=source.options,
            bos=source.bos,
            terms=source.terms,
            n_heads=content.n_heads,
            heads=content.heads,
            usage=content.usage,
            maps=LinearMaps(**content.maps) if content.maps else None,
        )

    def push_to_hub(
        self,
        repo_id: str,
        filename: str = HUB_FILE,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the file that `save` writes to a repository of the Hugging Face hub, which is created if it does not
        exist.

        Args:
            repo_id: the repository, such as "me/vectors".
            filename: the file's name in it.
            private: whether a new repository is private; None for the account's default.
            revision: the branch.
            token: by default the one of `hf auth login`.

        Returns:
            The commit's address.

        Raises:
            OSError: the hub refuses (huggingface_hub's HfHubHTTPError), or HF_HUB_OFFLINE is set.
            Exception: the hub cannot be reached; the error is that of huggingface_hub's HTTP client.
        """
        message = f"Task vectors of {self.task}, {self.model}"
        return upload(
            encode(self._content()), repo_id, filename, message, private=private, revision=revision, token=token
        )

    @classmethod
    def from_hub(
        cls, repo_id: str, filename: str = HUB_FILE, *, revision: str | None = None, token: str | None = None
    ) -> TaskVectors:
        """Read what `push_to_hub` wrote, by `load`, from the hub or from the copy kept of an earlier download.

        Args:
            repo_id: the repository.
            filename: the file's name in it.
            revision: a branch, tag or commit.
            token: by default the one of `hf auth login`.

        Returns:
            The vectors.

        Raises:
            OSError: no such repository or file, or the hub cannot be reached; the message is huggingface_hub's.
            TvLensError: as `load`.
        """
        return cls.load(download(repo_id, filename, revision=revision, token=token))

    def to_gguf(
        self,
        path: str | Path,
        *,
        layers: Sequence[int] | None = None,
        strength: float | None = None,
        model_hint: str | None = None,
    ) -> None:
        """Write a control vector for llama.cpp (`--control-vector`), which repeng reads, too; whole or not at all.

        llama.cpp adds the vectors of all layers in the file at once, each to the output of its block, at every token.
        It does not know the positions that the vectors are meant for, and it cannot add to the first block.

        Args:
            path: where to write.
            layers: the layers to export; None for all that have a vector, except layer 0.
            strength: what the vectors are multiplied by; None for the strength they are meant to be written with.
            model_hint: the model's architecture, such as "llama", as a note in the file; None for its name.

        Raises:
            MissingExtraError: the `gguf` extra is not installed.
            OSError: the folder is missing or cannot be written to.
            TvLensError: several vectors per layer (use `mean()`), vectors that overwrite, turn or depend on the prompt,
                another site than the residual stream, layer 0, or a layer without a vector.
        """
        export(self._content(), path, layers, strength, model_hint)

    @classmethod
    def from_gguf(cls, path: str | Path, *, model: str, n_layers: int, task: str = "") -> TaskVectors:
        """Read a control vector of llama.cpp or repeng: one vector for each of its layers, to be added at all positions
        and every step. The file does not say which model it is for, only a hint, which is kept in `options`.

        Args:
            path: the file.
            model: the name of the model that it is used on.
            n_layers: the number of that model's blocks.
            task: a name for the vectors; by default the file's.

        Returns:
            Vectors that are meant to be added at all positions and every step.

        Raises:
            MissingExtraError: the `gguf` extra is not installed.
            OSError: there is no such file.
            TvLensError: another kind of file, a damaged one, or layers that the model does not have.
        """
        return cls._of(load(path, Source(model, n_layers, task or Path(path).stem)))

    @classmethod
    def from_layers(
        cls,
        directions: Mapping[int, Vector],
        *,
        model: str,
        n_layers: int,
        task: str = "",
        method: str = "imported",
        site: Site = RESID_POST,
    ) -> TaskVectors:
        """Directions that were made elsewhere, as vectors to be added at all positions and every step.

        Args:
            directions: a tensor or an array of shape (d_model,) for each layer: `ControlVector.directions` of repeng or
                `SteeringVector.layer_activations` of steering-vectors. In both, as here, layer l is the output of block
                l, and a negative number counts from the last block.
            model: the name of the model that they are used on.
            n_layers: the number of that model's blocks.
            task: a name for the vectors.
            method: how they were made.
            site: what they are added to. For the layer types "self_attn" and "mlp" of steering-vectors pass `ATTN_OUT`
                and `MLP_OUT`.

        Returns:
            One vector for each layer of `directions`.

        Raises:
            TvLensError: no directions, different widths, NaN or infinity, a layer that the model does not have, or one
                twice.
        """
        return cls._of(imported(directions, Source(model, n_layers, task, method, site)))

    def check_same_model(self, other: TaskVectors) -> None:
        """Raise TvLensError if the others were read from another model, site or layers.

        Args:
            other: other vectors.

        Raises:
            TvLensError: the others were read from another model, site or layers.
        """
        if self.model != other.model or (self.n_layers, self.width) != (other.n_layers, other.width):
            raise TvLensError(
                f"vectors of {self.model} ({self.n_layers} layers, d_model {self.width}) and of {other.model} "
                f"({other.n_layers} layers, d_model {other.width}) do not go together: each model has its own residual "
                "stream; extract both from one model"
            )
        if (self.site, self.layers) != (other.site, other.layers):
            raise TvLensError(
                f"vectors of {self.site} for layers {_short_list(self.layers)} and of {other.site} for layers "
                f"{_short_list(other.layers)} do not go together; make both for the same site and layers"
            )
        if self.heads != other.heads:
            raise TvLensError(
                f"vectors of the heads {_heads_text(self.heads)} and of {_heads_text(other.heads)} do not go together; "
                "make both for the same heads"
            )

    def check_fits(self, model: str, n_layers: int, width: int) -> None:
        """Raise TvLensError if the vectors cannot be of that model: another depth or another width.

        Args:
            model: the model's name.
            n_layers: the number of its blocks.
            width: the width of the site.

        Raises:
            TvLensError: the vectors cannot be of that model: another depth or another width.
        """
        if (self.n_layers, self.width) != (n_layers, width):
            raise TvLensError(
                f"these vectors were read from {self.model} ({self.n_layers} layers, d_model {self.width}) and "
                f"{model} has {n_layers} layers, d_model {width}; extract them from the model they are used on"
            )


_WRITTEN = {"set": "overwrites", "add": "is added", "rotate": "turns the activation"}


def check_heads(heads: Sequence[Head], layers: Sequence[int], n_heads: int, model: str) -> None:
    """Raise TvLensError unless these are different heads of the model, in layers that have heads."""
    for pair in heads:
        if pair.layer not in layers or not 0 <= pair.head < n_heads:
            raise TvLensError(
                f"head {pair.head} of layer {pair.layer} is not one of {model}: it has {n_heads} heads, 0 to "
                f"{n_heads - 1}, in the layers {_short_list(layers)}"
            )
    if len(set(heads)) < len(heads):
        raise TvLensError(f"a head is listed twice: {_heads_text(heads)}")


def _heads_text(heads: Sequence[Head]) -> str:
    shown = ", ".join(str(head) for head in heads[:12])
    return f"{shown}, ..." if len(heads) > 12 else shown or "all"


def depth(layer: int, n_layers: int) -> float:
    """How far up the model the output of block `layer` is: the fraction of the blocks that have been run."""
    return (layer + 1) / n_layers


def layers_text(layers: int | Sequence[int]) -> str:
    """Layers in few characters: "7", "3, 7" or "0-12, 20"."""
    if isinstance(layers, int):
        return str(layers)
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts)


def layer_label(layer: int | tuple[int, ...], n_layers: int | None) -> str:
    """The layer in words, with its depth if the model's is known; or several layers."""
    if not isinstance(layer, int):
        return f"layers {layers_text(layer)}"
    return f"layer {layer}" + ("" if n_layers is None else f" (depth {depth(layer, n_layers):.2f})")


def _short_list(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:12]))
    return f"[{shown}, ...]" if len(numbers) > 12 else f"[{shown}]"


def check_layers(layers: object, n_layers: int, model: str) -> list[int]:
    """The numbers of several layers, checked.

    Raises:
        TvLensError: no list, no layers, one of them twice, or one that `model` does not have.
    """
    if not isinstance(layers, Sequence) or not len(layers) or len(set(layers)) < len(layers):
        raise TvLensError(f"layers are {layers!r}; give a list of different ones, at least one, or None for all")
    for layer in layers:
        check_layer(layer, n_layers, model)
    return [index(layer) for layer in layers]  # NumPy integers are not JSON-serializable


def check_layer(layer: object, n_layers: int, model: str) -> None:
    """Raise TvLensError if `model` has no such layer."""
    try:
        number = -1 if isinstance(layer, bool) else index(layer)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if not 0 <= number < n_layers:
        raise TvLensError(f"layer {layer} is not one of {model}: layer l is the output of block l, 0 to {n_layers - 1}")
