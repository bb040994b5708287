"""Safetensors files with a header of JSON and a checksum. Nothing in them is executed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tv_lens.errors import TvLensError
from tv_lens.files import from_json, to_json


@dataclass(frozen=True)
class TensorFile:
    """A kind of file: the name of its entry in the safetensors header, what it holds, in words, and its format.

    Raise `format` when older versions can no longer read the file.
    """

    entry: str
    holds: str
    format: int

    def pack(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
        """The file's bytes; the same content always gives the same bytes."""
        whole = {"format": self.format, **header}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        whole["sha256"] = _digest(whole, contiguous)
        # One entry: safetensors would write several in another order each time.
        return safetensors.torch.save(contiguous, {self.entry: to_json(whole).decode()})

    def unpack(self, content: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The header and the tensors that `pack` was given.

        Raises:
            TvLensError: another kind of file, a damaged one, or one of a newer version of tv_lens.
        """
        try:
            tensors = safetensors.torch.load(content)
        except safetensors.SafetensorError as error:
            raise TvLensError(str(error)) from error
        size = int.from_bytes(content[:8], "little")
        entries = from_json(content[8 : 8 + size]).get("__metadata__") or {}
        if self.entry not in entries:
            raise TvLensError(f"it has no {self.holds}")
        header = from_json(entries[self.entry])
        if not isinstance(header, dict) or not isinstance(header.get("format"), int):
            raise TvLensError("its header has no format")
        if header["format"] > self.format:
            raise TvLensError(
                f"written in format {header['format']} by a newer tv_lens; this one reads up to {self.format}"
            )
        if header.pop("sha256", None) != _digest(header, tensors):
            raise TvLensError("its content does not match its checksum")
        del header["format"]
        return header, tensors


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """A checksum of the numbers and everything else, which detects damaged copies."""
    parts = [to_json([header, {name: list(tensors[name].shape) for name in sorted(tensors)}])]
    parts += [tensors[name].contiguous().view(torch.uint8).numpy().tobytes() for name in sorted(tensors)]
    return hashlib.sha256(b"".join(parts)).hexdigest()
