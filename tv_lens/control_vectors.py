"""Control vectors: one direction per layer, added to the output of its block at every token.

llama.cpp, repeng and steering-vectors use them. A GGUF file of them holds a tensor `direction.{l}` for each block l, as
repeng writes it and llama.cpp reads it. llama.cpp has none for block 0.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import index
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tv_lens.edits import RESID_POST, Site, Usage, add
from tv_lens.errors import MissingExtraError, TvLensError, warn
from tv_lens.files import write_whole
from tv_lens.provenance import Provenance
from tv_lens.vector_files import Content

Vector: TypeAlias = Float[Tensor, " width"] | Float[np.ndarray, " width"]

_ARCHITECTURE = "controlvector"


class Source(NamedTuple):
    """What is known of directions that were made elsewhere."""

    model: str
    n_layers: int
    task: str = ""
    method: str = "imported"
    site: Site = RESID_POST


def export(
    content: Content, path: str | Path, layers: Sequence[int] | None, strength: float | None, model_hint: str | None
) -> None:
    """Write vectors into a GGUF file for llama.cpp; see `TaskVectors.to_gguf`.

    Raises:
        MissingExtraError: the `gguf` extra is not installed.
        OSError: the folder is missing or cannot be written to.
        TvLensError: vectors that cannot be added by llama.cpp.
    """
    _require_gguf()
    _check_addable(content)
    scale = add(content.usage.strength if strength is None else strength).strength
    chosen = _chosen_layers(content, layers)
    directions = {layer: content.values[0, content.layers.index(layer)] * scale for layer in chosen}
    write_whole(path, _encoded(directions, model_hint or content.provenance.model))


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError('control vectors are GGUF files; pip install "tv_lens[gguf]"')


def _check_addable(content: Content) -> None:
    """Raise TvLensError unless the vectors are one vector per layer that is added to the residual stream."""
    name = f"the vectors of {content.provenance.task!r}"
    if content.usage.per_position:
        raise TvLensError(f"{name} belong to several positions; llama.cpp adds one vector at every token")
    if len(content.values) > 1:
        raise TvLensError(f"{name} are {len(content.values)} per layer and llama.cpp adds one; use vectors.mean()")
    if content.maps:
        raise TvLensError(f"{name} depend on the prompt (linear maps); llama.cpp adds the same vector at every token")
    if content.site != RESID_POST:
        raise TvLensError(f"{name} belong to {content.site}; llama.cpp adds to {RESID_POST} alone")
    if content.op == "set":
        raise TvLensError(
            f"{name} overwrite the activation, and llama.cpp can only add; export a difference instead, such as "
            "mean_difference(...), a function vector, or dataclasses.replace(vectors - others, op='add')"
        )
    if content.usage.keep_norm:
        raise TvLensError(f"{name} keep the activation's length, which llama.cpp cannot; use a usage without keep_norm")
    if content.op != "add":
        raise TvLensError(f"{name} turn the activation ({content.op!r}), and llama.cpp can only add")


def _chosen_layers(content: Content, layers: Sequence[int] | None) -> list[int]:
    """The layers to export, in order."""
    if layers is None:
        chosen = sorted(layer for layer in content.usage.tried or content.layers if layer > 0)
        if not chosen:
            raise TvLensError("the vectors are for layer 0 alone, which llama.cpp cannot add to")
        if 0 in content.layers:
            warn("layer 0 is left out of the file: llama.cpp cannot add to the output of the first block")
        return chosen
    chosen = sorted(_number(layer) for layer in layers)
    if not chosen or len(set(chosen)) < len(chosen):
        raise TvLensError(f"layers are {layers!r}; give a list of different ones, at least one, or None for all")
    for layer in chosen:
        if layer == 0:
            raise TvLensError("llama.cpp cannot add to the output of the first block; leave layer 0 out")
        if layer not in content.layers:
            raise TvLensError(f"there is no vector for layer {layer}, only for {list(content.layers)}")
    return chosen


def _number(layer: object) -> int:
    try:
        if not isinstance(layer, bool):
            return index(layer)  # type: ignore[arg-type]
    except TypeError:
        pass  # not a whole number
    raise TvLensError(f"layer {layer!r} is not a whole number; layer l is the output of block l")


def _encoded(directions: Mapping[int, Float[Tensor, " width"]], model_hint: str) -> bytes:
    """A GGUF file's bytes."""
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.gguf"
        writer = GGUFWriter(path, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(directions))
        for layer, direction in directions.items():
            writer.add_tensor(f"direction.{layer}", direction.to(torch.float32).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def load(path: str | Path, source: Source) -> Content:
    """The directions of a GGUF file; see `TaskVectors.from_gguf`.

    Raises:
        MissingExtraError: the `gguf` extra is not installed.
        OSError: there is no such file.
        TvLensError: another kind of file, a damaged one, or layers that the model does not have.
    """
    _require_gguf()
    try:
        directions, hint = _decoded(Path(path))
        content = imported(directions, source)
    except TvLensError as error:
        raise TvLensError(f"{path}: {error}") from error
    return replace(content, provenance=replace(content.provenance, options={"model_hint": hint}))


def _decoded(path: Path) -> tuple[dict[int, Vector], str]:
    """The directions in a GGUF file, and what it says about its model."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        field = reader.get_field(f"{_ARCHITECTURE}.model_hint")
        hint = "" if field is None else str(field.contents())
    except OSError:
        raise
    except Exception as error:  # the reader checks little, so a damaged file fails in many ways
        raise TvLensError(f"not a GGUF file, or a damaged one ({error})") from error
    directions: dict[int, Vector] = {}
    for tensor in reader.tensors:
        match = re.fullmatch(r"direction\.(\d{1,6})", tensor.name)
        if match is None or tensor.data.dtype.kind != "f":
            raise TvLensError(
                f"holds the tensor {tensor.name!r} ({tensor.tensor_type.name}); a control vector has tensors of floats "
                "named direction.1, direction.2 and so on"
            )
        directions[int(match[1])] = np.array(tensor.data, dtype=np.float32)
    return directions, hint


def imported(directions: Mapping[int, Vector], source: Source) -> Content:
    """One direction per layer as vectors; see `TaskVectors.from_layers`.

    Raises:
        TvLensError: no directions, different widths, NaN or infinity, or layers that the model does not have.
    """
    if not directions:
        raise TvLensError("there are no directions; give at least one, by its layer")
    if source.site.per_head:
        raise TvLensError("heads have no single direction; give the site of the whole block, RESID_POST or ATTN_OUT")
    by_layer: dict[int, Tensor] = {}
    for key, given in directions.items():
        layer = _number(key)
        if not -source.n_layers <= layer < source.n_layers:
            raise TvLensError(
                f"layer {layer} is not one of {source.model}: it has the layers 0 to {source.n_layers - 1}, or "
                f"-{source.n_layers} to -1 from its end"
            )
        layer %= source.n_layers
        if layer in by_layer:
            raise TvLensError(f"there are two directions for layer {layer}, one of them by its negative number")
        by_layer[layer] = _direction(given, key)
    layers = tuple(sorted(by_layer))
    widths = {layer: len(by_layer[layer]) for layer in layers}
    if len(set(widths.values())) > 1:
        raise TvLensError(f"the directions have different widths, by layer: {widths}; they are not of one model")
    values = torch.stack([by_layer[layer] for layer in layers])[None]
    usage = Usage(positions="all", every_step=True)
    provenance = Provenance(source.model, source.task, source.method)
    return Content(values, provenance, source.site, "add", layers, source.n_layers, usage=usage)


def _direction(given: Vector, layer: int) -> Float[Tensor, " width"]:
    """A tensor or an array as float32 on the CPU."""
    if isinstance(given, Tensor):
        direction = given.detach().to("cpu", torch.float32)
    else:
        direction = torch.from_numpy(np.array(given, dtype=np.float32))
    if direction.ndim != 1 or not len(direction):
        raise TvLensError(f"the direction of layer {layer} has the shape {tuple(direction.shape)}; give (d_model,)")
    if not bool(direction.isfinite().all()):
        raise TvLensError(f"the direction of layer {layer} holds NaN or infinity")
    return direction
