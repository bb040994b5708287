from __future__ import annotations

import json
import os
import struct
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tv_lens import TaskVectors, Template
from tv_lens.files import write_whole

VECTORS = TaskVectors(
    torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) * 1e-3,
    "tiny",
    "größe",
    Template("Q: {input} {x}\nA: {output}", "\n\n"),
    ("Q: a\nA:", "é{}", ""),
    (("b", "c"), ("d", "e"), ("f", '"g"')),
    "extract",
    False,
    {"torch": "9.9"},
)


@pytest.mark.parametrize("vectors", [VECTORS, replace(VECTORS, template=None, prepend_bos=None), VECTORS.mean()])
def test_a_saved_file_is_read_back_bit_for_bit(tmp_path: Path, vectors: TaskVectors) -> None:
    vectors.save(tmp_path / "v.safetensors")
    loaded = TaskVectors.load(tmp_path / "v.safetensors")
    assert torch.equal(loaded.values, vectors.values)
    for each in fields(TaskVectors):
        if each.name != "values":
            assert getattr(loaded, each.name) == getattr(vectors, each.name)
    assert [path.name for path in tmp_path.iterdir()] == ["v.safetensors"]


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(content: bytes, **changes: Any) -> bytes:
    """The file with other things in its own header: safetensors writes the length, then JSON, then the numbers."""
    header, numbers = header_of(content)
    ours = json.loads(header["__metadata__"]["tv_lens"])
    changes["sha256"] = ...
    ours = {name: value for name, value in {**ours, **changes}.items() if value is not ...}
    header["__metadata__"]["tv_lens"] = json.dumps(ours)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + numbers


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    VECTORS.save(tmp_path / "good.safetensors")
    return (tmp_path / "good.safetensors").read_bytes()


def load(folder: Path, content: bytes) -> TaskVectors:
    (folder / "bad.safetensors").write_bytes(content)
    return TaskVectors.load(folder / "bad.safetensors")


def test_a_rewritten_header_is_read(tmp_path: Path, content: bytes) -> None:
    """Or the tests below would fail for another reason."""
    assert load(tmp_path, with_header(content, task="other")).task == "other"


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 500, -1, -4])
def test_a_truncated_file_says_so(tmp_path: Path, content: bytes, kept: int) -> None:
    with pytest.raises(ValueError, match=r"bad.safetensors: not a safetensors file, or cut short"):
        load(tmp_path, content[:kept])


@pytest.mark.parametrize("other", [b"PK\x03\x04 a pickle of torch", b"{}", b"\x80\x04K\x01." * 20, b"\xff" * 64])
def test_another_kind_of_file_says_so(tmp_path: Path, other: bytes) -> None:
    with pytest.raises(ValueError, match=r"bad.safetensors: not a safetensors file"):
        load(tmp_path, other)


def test_other_tensors_say_so(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"a safetensors file, but not one of task vectors .it holds \['weight'\]"):
        load(tmp_path, save({"weight": torch.zeros(2)}))
    header = header_of(with_header(content))[0]["__metadata__"]
    for wrong in (torch.zeros(2, 3), torch.zeros(1, 2, 3, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"bad.safetensors: holds .*, not task vectors"):
            load(tmp_path, save({"values": wrong}, header))
    with pytest.raises(ValueError, match="NaN or infinity"):
        load(tmp_path, save({"values": torch.full((1, 2, 3), torch.nan)}, header))


def test_a_newer_format_says_to_upgrade(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"written in format 2 by a newer tv_lens; .* upgrade"):
        load(tmp_path, with_header(content, format=2, task=...))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "1"},
        {"format": ...},
        {"task": ...},
        {"task": 3},
        {"model": None},
        {"template": "x"},
        {"template": {"example": "{input}", "separator": "\n"}},
        {"prompts": 3},
        {"prompts": [1, 2]},
        {"substitutes": [1]},
        {"versions": ["x"]},
        {"versions": {"torch": 2}},
        {"prepend_bos": "yes"},
    ],
)
def test_a_hand_edited_header_says_so(tmp_path: Path, content: bytes, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"bad.safetensors: its header has been changed and cannot be read"):
        load(tmp_path, with_header(content, **changes))


def test_no_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file of task vectors"):
        TaskVectors.load(tmp_path / "none.safetensors")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kept"
    write_whole(path, b"first")

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    for step in ("replace", "fsync"):
        with monkeypatch.context() as patched:
            patched.setattr(os, step, fail)
            with pytest.raises(KeyboardInterrupt):
                write_whole(path, b"second")
        assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"kept": b"first"}
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"
    with pytest.raises(OSError, match="nowhere"):
        write_whole(tmp_path / "nowhere" / "file", b"")
