"""Files of task vectors: safetensors, with the provenance as JSON in the header. Nothing in them is executed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from tv_lens.edits import RESID_POST, SITES, Head, Op, Site, Usage
from tv_lens.errors import TvLensError
from tv_lens.files import from_json, to_json, typed
from tv_lens.prompts import format_from_dict
from tv_lens.provenance import Option, Provenance, Term

# Raise this number when older versions can no longer read the file.
FORMAT = 2

# The default file name in a repository of the Hugging Face hub.
HUB_FILE = "task_vectors.safetensors"


class NewerFormatError(TvLensError):
    """The file was written by a newer version of tv_lens."""


@dataclass(frozen=True)
class Content:
    """All that a file holds."""

    values: Float[Tensor, "prompt layer width"]
    provenance: Provenance
    site: Site
    op: Op
    layers: tuple[int, ...]
    n_layers: int
    n_heads: int = 0
    heads: tuple[Head, ...] = ()
    usage: Usage = field(default_factory=Usage)
    maps: Mapping[str, Tensor] = field(default_factory=dict)


# The tensors of linear maps, beside the vectors themselves.
_MAPS = ("inward", "lengths", "outward")


@dataclass(frozen=True)
class _Header:
    """The JSON in a file's header, with its types."""

    format: int
    model: str
    task: str
    template: dict[str, Any] | None
    prompts: tuple[str, ...]
    substitutes: tuple[tuple[str, ...], ...]
    method: str
    prepend_bos: bool | None
    versions: dict[str, str]
    site: str = RESID_POST.name
    op: Op = "set"
    layers: tuple[int, ...] = ()
    n_layers: int = 0
    options: dict[str, Option] = field(default_factory=dict)
    bos: str | None = None
    terms: tuple[Term, ...] = ()
    n_heads: int = 0
    heads: tuple[tuple[int, int], ...] = ()
    usage: Usage = field(default_factory=Usage)
    notes: dict[str, float] = field(default_factory=dict)
    sha256: str | None = None


def encode(content: Content, notes: Mapping[str, float] | None = None) -> bytes:
    """The file's bytes; the same content always gives the same bytes. `notes` are read by `read_notes` alone."""
    template = content.provenance.template
    header = {
        "format": FORMAT,
        **asdict(content.provenance),
        "template": None if template is None else template.to_dict(),
        "site": content.site.name,
        "op": content.op,
        "layers": content.layers,
        "n_layers": content.n_layers,
    }
    if content.n_heads:
        header |= {"n_heads": content.n_heads, "heads": [list(head) for head in content.heads]}
    if content.usage != Usage():
        header["usage"] = asdict(content.usage)
    if notes:
        header["notes"] = dict(notes)
    tensors = {name: tensor.contiguous() for name, tensor in {"values": content.values, **content.maps}.items()}
    header["sha256"] = _digest(header, tensors)
    # One entry: safetensors would write several in another order each time.
    metadata = {"tv_lens": to_json(header).decode()}
    return safetensors.torch.save(tensors, metadata)


def read(path: Path) -> Content:
    """What `encode` wrote into a file.

    Raises:
        OSError: there is no such file.
        TvLensError: another kind of file, a damaged one, or one of a newer version of tv_lens.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder, not a file of task vectors")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of task vectors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names if name in ("values", *_MAPS)}
    except safetensors.SafetensorError as error:
        raise TvLensError(f"{path}: not a safetensors file, or cut short ({error})") from error
    if "tv_lens" not in metadata or "values" not in tensors:
        raise TvLensError(f"{path}: a safetensors file, but not one of task vectors (it holds {names})")
    try:
        raw = from_json(metadata["tv_lens"])
        header = _header(raw)
        template = None if header.template is None else format_from_dict(header.template)
    except NewerFormatError as error:
        raise NewerFormatError(f"{path}: {error}") from error
    except TvLensError as error:
        raise TvLensError(f"{path}: its header has been changed and cannot be read ({error})") from error
    values = tensors["values"]
    if any(tensor.dtype != torch.float32 for tensor in tensors.values()) or values.ndim != 3:
        raise TvLensError(f"{path}: holds {values.dtype} of shape {tuple(values.shape)}, not task vectors")
    maps = {name: tensors[name] for name in _MAPS if name in tensors}
    if len(maps) not in (0, len(_MAPS)):
        raise TvLensError(f"{path}: its linear maps are incomplete: {sorted(maps)}")
    # A header that was edited on purpose has no checksum.
    if header.sha256 not in (None, _digest(raw, tensors)):
        raise TvLensError(f"{path}: damaged: its content does not match its checksum; copy or extract it again")
    provenance = Provenance(
        model=header.model,
        task=header.task,
        method=header.method,
        options=header.options,
        template=template,
        prompts=header.prompts,
        substitutes=header.substitutes,
        prepend_bos=header.prepend_bos,
        bos=header.bos,
        versions=header.versions,
        terms=header.terms,
    )
    heads = tuple(Head(*pair) for pair in header.heads)
    layout = (SITES[header.site], header.op, header.layers, header.n_layers, header.n_heads, heads, header.usage)
    return Content(values, provenance, *layout, maps=maps)


def read_notes(path: Path) -> dict[str, float]:
    """The notes of a file that `read` accepts; empty if there are none."""
    with safetensors.safe_open(path, framework="pt") as file:
        return _header(from_json(file.metadata()["tv_lens"])).notes


def _header(raw: Any) -> _Header:
    if isinstance(raw, dict) and type(raw.get("format")) is int and raw["format"] > FORMAT:
        raise NewerFormatError(
            f"written in format {raw['format']} by a newer tv_lens; this one reads up to {FORMAT}, so upgrade it"
        )
    header = typed(raw, _Header)
    if header.format < 1:
        raise TvLensError("format is a whole number from 1")
    if header.site not in SITES:
        raise TvLensError(f"site {header.site!r} is not one of {', '.join(SITES)}")
    return header


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """A checksum of the numbers and their provenance, which detects damaged copies."""
    named = {name: value for name, value in header.items() if name != "sha256"}
    digest = hashlib.sha256(to_json([named, list(tensors["values"].shape)]))
    for name in ("values", *_MAPS):
        if name in tensors:
            digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def upload(
    content: bytes,
    repo_id: str,
    filename: str,
    message: str,
    private: bool | None,
    revision: str | None,
    token: str | None,
) -> str:
    """Put a file into a repository of the Hugging Face hub, which is created if needed; returns its address."""
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    hub.create_repo(repo_id, private=private, exist_ok=True)
    commit = hub.upload_file(
        path_or_fileobj=content, path_in_repo=filename, repo_id=repo_id, revision=revision, commit_message=message
    )
    return str(commit.commit_url)


def download(repo_id: str, filename: str, revision: str | None, token: str | None) -> Path:
    """A file of a repository of the Hugging Face hub, or the copy kept of an earlier download."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo_id, filename, revision=revision, token=token))
