"""Control vectors: their files against the gguf package, and vectors of other packages against plain Hugging Face hooks
that add them as these packages do.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from models import Twins, ids_of
from oracle_edits import PlainEdit, hooked_run
from torch import Tensor

import tv_lens as tv
from tv_lens import TaskVectors, Usage

TEXTS = ["hot -> cold\nbig ->", "a", "the quick brown fox ->"]
STEERING = Usage(positions="all", every_step=True, strength=1.0)


def vectors_for(n: int = 1, **changes: Any) -> TaskVectors:
    values = torch.randn(n, 4, 32, generator=torch.Generator().manual_seed(3))
    return TaskVectors(values, "tiny-llama", "mood", **{"op": "add", "usage": STEERING, **changes})


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header and the tensors of a GGUF file, as the gguf package reads them."""
    reader = gguf.GGUFReader(path)
    header = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return header, {tensor.name: tensor for tensor in reader.tensors}


def write_as_repeng(path: Path, directions: Mapping[int, Any], hint: str | None = "llama") -> None:
    """The steps of repeng's `ControlVector.export_gguf`."""
    writer = gguf.GGUFWriter(path, "controlvector")
    if hint is not None:
        writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(directions))
    for layer, direction in directions.items():
        writer.add_tensor(f"direction.{layer}", direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def added_logits(twins: Twins, text: str, added: Mapping[int, Tensor]) -> Tensor:
    """Next-token logits with each layer's vector added to its block's output at every token, by plain hooks."""
    ids = ids_of(twins.bridge, text)
    edits = [
        PlainEdit("resid_post", layer, position, vector, "add")
        for layer, vector in added.items()
        for position in range(ids.shape[1])
    ]
    return hooked_run(twins, ids, edits)[1][-1]


# Export


def test_a_file_holds_one_tensor_per_layer(tmp_path: Path) -> None:
    vectors = vectors_for()
    vectors.to_gguf(tmp_path / "v.gguf", layers=[3, 1], strength=2.0, model_hint="llama")
    header, tensors = contents(tmp_path / "v.gguf")
    assert header == {
        "general.architecture": "controlvector",
        "controlvector.model_hint": "llama",
        "controlvector.layer_count": 2,
    }
    assert list(tensors) == ["direction.1", "direction.3"]
    for layer in (1, 3):
        tensor = tensors[f"direction.{layer}"]
        assert (tensor.tensor_type, tensor.shape.tolist()) == (gguf.GGMLQuantizationType.F32, [32])
        assert torch.equal(torch.from_numpy(np.array(tensor.data)), 2 * vectors.values[0, layer])
    assert [path.name for path in tmp_path.iterdir()] == ["v.gguf"]


def test_layer_0_is_left_out_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(tv.TvLensWarning, match="layer 0 is left out"):
        vectors_for().to_gguf(tmp_path / "v.gguf")
    header, tensors = contents(tmp_path / "v.gguf")
    assert list(tensors) == ["direction.1", "direction.2", "direction.3"]
    assert header["controlvector.model_hint"] == "tiny-llama"
    some = replace(vectors_for(), values=torch.ones(1, 2, 32), layers=(2, 3), n_layers=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some.to_gguf(tmp_path / "some.gguf")
    assert list(contents(tmp_path / "some.gguf")[1]) == ["direction.2", "direction.3"]


def test_vectors_are_exported_with_the_strength_they_are_meant_to_have(llama: Twins, tmp_path: Path) -> None:
    """What is read back does the same to the logits."""
    vectors = vectors_for(usage=replace(STEERING, strength=3.0))
    vectors.to_gguf(tmp_path / "v.gguf", layers=[2])
    loaded = TaskVectors.from_gguf(tmp_path / "v.gguf", model="tiny-llama", n_layers=4)
    assert (loaded.op, loaded.usage, loaded.layers, loaded.n_layers) == ("add", STEERING, (2,), 4)
    assert (loaded.task, loaded.method, loaded.options) == ("v", "imported", {"model_hint": "tiny-llama"})
    torch.testing.assert_close(
        tv.patched_logits(llama.bridge, TEXTS, loaded, 2), tv.patched_logits(llama.bridge, TEXTS, vectors, 2)
    )
    loaded.to_gguf(tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "v.gguf").read_bytes()


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        (vectors_for(2), {}, r"are 2 per layer and llama.cpp adds one; use vectors.mean\(\)"),
        (vectors_for(op="set"), {}, "overwrite the activation, and llama.cpp can only add; export a difference"),
        (vectors_for(op="rotate"), {}, "turn the activation"),
        (vectors_for(site=tv.MLP_OUT), {}, "belong to mlp_out; llama.cpp adds to resid_post alone"),
        (vectors_for(site=tv.HEADS, n_heads=4, heads=(tv.Head(1, 2),)), {}, "belong to heads"),
        (vectors_for(2, usage=Usage(per_position=True)), {}, "belong to several positions"),
        (
            vectors_for(maps=tv.LinearMaps(torch.ones(4, 2, 32), torch.ones(4, 2, 32), torch.ones(4))),
            {},
            "depend on the prompt",
        ),
        (vectors_for(), {"layers": [0, 1]}, "cannot add to the output of the first block; leave layer 0 out"),
        (vectors_for(), {"layers": [4]}, r"no vector for layer 4, only for \[0, 1, 2, 3\]"),
        (vectors_for(), {"layers": [-1]}, "no vector for layer -1"),
        (vectors_for(), {"layers": []}, "at least one"),
        (vectors_for(), {"layers": [1, 1]}, "list of different ones"),
        (vectors_for(), {"layers": ["1"]}, "layer '1' is not a whole number"),
        (vectors_for(), {"strength": float("inf")}, "strength is inf"),
        (
            TaskVectors(torch.ones(1, 1, 32), "tiny", "t", op="add", layers=(0,), n_layers=4),
            {},
            "for layer 0 alone",
        ),
    ],
)
def test_what_llama_cpp_cannot_add_is_not_written(
    tmp_path: Path, as_users_run_it: None, vectors: TaskVectors, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(tv.TvLensError, match=message):
        vectors.to_gguf(tmp_path / "v.gguf", **options)
    assert not list(tmp_path.iterdir())


def test_a_difference_of_states_can_be_exported(tmp_path: Path) -> None:
    """As the message about vectors that overwrite says."""
    states = vectors_for(op="set", usage=Usage())
    difference = replace(states - 0.5 * states, op="add")
    difference.to_gguf(tmp_path / "v.gguf", layers=[1])
    tensor = contents(tmp_path / "v.gguf")[1]["direction.1"]
    torch.testing.assert_close(torch.from_numpy(np.array(tensor.data)), states.values[0, 1] / 2)


def test_a_mean_difference_goes_to_a_file_and_back(llama: Twins, tmp_path: Path) -> None:
    vectors = tv.mean_difference(llama.bridge, ["hot", "the quick"], ["cold and", "a"])
    vectors.to_gguf(tmp_path / "v.gguf", layers=[1, 2, 3])
    loaded = TaskVectors.from_gguf(tmp_path / "v.gguf", model="tiny-llama", n_layers=4, task="mood")
    assert torch.equal(loaded.values, vectors.values[:, 1:])
    actual = tv.patched_logits(llama.bridge, TEXTS, loaded, tv.layers(1, 2, 3))
    for row, text in enumerate(TEXTS):
        added = {layer: vectors.values[0, layer] for layer in (1, 2, 3)}
        torch.testing.assert_close(actual[row], added_logits(llama, text, added), atol=1e-4, rtol=1e-4)


# Import


def test_files_of_repeng_are_read(tmp_path: Path) -> None:
    """Its layers are in falling order, and the first block is allowed."""
    directions = {layer: np.arange(32, dtype=np.float32) + layer for layer in (3, 2, 0)}
    write_as_repeng(tmp_path / "happy.gguf", directions)
    loaded = TaskVectors.from_gguf(tmp_path / "happy.gguf", model="m", n_layers=4)
    assert (loaded.layers, loaded.task, loaded.model) == ((0, 2, 3), "happy", "m")
    assert loaded.options == {"model_hint": "llama"}
    for layer in (0, 2, 3):
        assert loaded.at(layer)[0].tolist() == directions[layer].tolist()
    write_as_repeng(tmp_path / "half.gguf", {1: np.arange(4, dtype=np.float16)}, hint=None)
    half = TaskVectors.from_gguf(tmp_path / "half.gguf", model="m", n_layers=2)
    assert (half.at(1).tolist(), half.options) == ([[0.0, 1.0, 2.0, 3.0]], {"model_hint": ""})


def test_other_files_are_refused(tmp_path: Path) -> None:
    def read(name: str, n_layers: int = 4) -> TaskVectors:
        return TaskVectors.from_gguf(tmp_path / name, model="m", n_layers=n_layers)

    with pytest.raises(FileNotFoundError):
        read("none.gguf")
    whole = {layer: np.ones(32, dtype=np.float32) for layer in (1, 3)}
    write_as_repeng(tmp_path / "v.gguf", whole)
    content = (tmp_path / "v.gguf").read_bytes()
    for length in [0, 3, 40, 100, len(content) // 2, len(content) - 40]:
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(tv.TvLensError, match=r"cut.gguf: not a GGUF file, or a damaged one"):
            read("cut.gguf")
    with pytest.raises(tv.TvLensError, match=r"v.gguf: layer 3 is not one of m: it has the layers 0 to 2"):
        read("v.gguf", n_layers=3)
    write_as_repeng(tmp_path / "int.gguf", {1: np.ones(32, dtype=np.int8)})
    with pytest.raises(tv.TvLensError, match=r"holds the tensor 'direction.1' \(I8\)"):
        read("int.gguf")
    write_as_repeng(tmp_path / "nan.gguf", {1: np.full(32, np.nan, dtype=np.float32)})
    with pytest.raises(tv.TvLensError, match=r"nan.gguf: the direction of layer 1 holds NaN"):
        read("nan.gguf")
    write_as_repeng(tmp_path / "none.gguf", {})
    with pytest.raises(tv.TvLensError, match=r"none.gguf: there are no directions"):
        read("none.gguf")
    write_as_repeng(tmp_path / "odd.gguf", {"x": np.ones(4, dtype=np.float32)})  # type: ignore[dict-item]
    with pytest.raises(tv.TvLensError, match=r"odd.gguf: holds the tensor 'direction.x'"):
        read("odd.gguf")


@pytest.mark.parametrize("kind", ["repeng", "steering-vectors"])
def test_imported_vectors_do_what_they_do_there(llama: Twins, kind: str) -> None:
    """Both packages add a layer's vector to the output of its block, at every token."""
    generator = torch.Generator().manual_seed(5)
    made = {layer: torch.randn(32, generator=generator) for layer in (3, 2, 1)}
    given: dict[int, Any] = {layer: vector.numpy() for layer, vector in made.items()}
    if kind == "steering-vectors":
        given = {layer: vector.clone().requires_grad_() for layer, vector in made.items()}
    vectors = TaskVectors.from_layers(given, model="tiny-llama", n_layers=4, task="mood", method=kind)
    assert (vectors.layers, vectors.method, vectors.usage, vectors.op) == ((1, 2, 3), kind, STEERING, "add")
    together = tv.patched_logits(llama.bridge, TEXTS, vectors, tv.layers(1, 2, 3))
    single = tv.patched_logits(llama.bridge, TEXTS, vectors, 2)
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(together[row], added_logits(llama, text, made), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(single[row], added_logits(llama, text, {2: made[2]}), atol=1e-4, rtol=1e-4)


def test_other_sites_and_negative_layers_are_imported(llama: Twins) -> None:
    vector = torch.randn(32, generator=torch.Generator().manual_seed(6))
    for name, site in (("attn_out", tv.ATTN_OUT), ("mlp_out", tv.MLP_OUT)):
        vectors = TaskVectors.from_layers({-3: vector}, model="tiny-llama", n_layers=4, site=site)
        assert vectors.layers == (1,)
        actual = tv.patched_logits(llama.bridge, TEXTS, vectors, 1)
        for row, text in enumerate(TEXTS):
            ids = ids_of(llama.bridge, text)
            edits = [PlainEdit(name, 1, position, vector, "add") for position in range(ids.shape[1])]
            torch.testing.assert_close(actual[row], hooked_run(llama, ids, edits)[1][-1], atol=1e-4, rtol=1e-4)


def test_imported_tensors_are_copied_as_float32(as_users_run_it: None) -> None:
    halves, doubles, singles = torch.ones(4, dtype=torch.bfloat16), np.ones(4), np.ones(4, dtype=np.float32)
    singles.flags.writeable = False
    numbered: Any = {np.int64(0): halves, np.int64(1): doubles, np.int64(2): singles}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vectors = TaskVectors.from_layers(numbered, model="m", n_layers=3)
    halves.zero_()
    assert vectors.values.tolist() == [[[1.0] * 4] * 3]
    assert vectors.values.dtype == torch.float32


ONE = torch.ones(4)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ({}, "no directions"),
        ({1: ONE, 2: torch.ones(5)}, r"different widths, by layer: \{1: 4, 2: 5\}"),
        ({1: ONE, 2: torch.tensor([1, torch.nan, 0, 0])}, "direction of layer 2 holds NaN or infinity"),
        ({1: np.array([1, np.inf, 0, 0])}, "direction of layer 1 holds NaN or infinity"),
        ({4: ONE}, "layer 4 is not one of m: it has the layers 0 to 3, or -4 to -1 from its end"),
        ({-5: ONE}, "layer -5 is not one of m"),
        ({3: ONE, -1: ONE}, "two directions for layer 3"),
        ({"1": ONE}, "layer '1' is not a whole number"),
        ({True: ONE}, "layer True is not a whole number"),
        ({1: torch.ones(1, 4)}, r"layer 1 has the shape \(1, 4\)"),
        ({1: torch.ones(0)}, r"layer 1 has the shape \(0,\)"),
    ],
)
def test_directions_that_do_not_fit_are_refused(as_users_run_it: None, directions: Any, message: str) -> None:
    with pytest.raises(tv.TvLensError, match=message):
        TaskVectors.from_layers(directions, model="m", n_layers=4)
    with pytest.raises(tv.TvLensError, match="heads have no single direction"):
        TaskVectors.from_layers({1: ONE}, model="m", n_layers=4, site=tv.HEADS)


def test_files_need_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(tv.MissingExtraError, match=r"tv_lens\[gguf\]"):
        vectors_for().to_gguf(tmp_path / "v.gguf", layers=[1])
    with pytest.raises(tv.MissingExtraError, match=r"tv_lens\[gguf\]"):
        TaskVectors.from_gguf(tmp_path / "v.gguf", model="m", n_layers=4)


def test_the_pages_on_contrasts_run(llama: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    docs = Path(__file__).parents[1] / "docs"
    pages = ("methods/mean_difference.md", "methods/in_context.md", "contrast.md")
    text = "\n".join((docs / page).read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"^```python (\w+)\n(.*?)^```$", text, re.M | re.S)
    assert [name for name, _ in blocks] == ["mean", "turned", "experiment", "export", "import"]
    task = tv.Task("upper", tuple(f"{a}{b}" for a in "abcd" for b in "stuv"), str.upper)
    engine = tv.LocalEngine(llama.bridge, progress=False)
    known: dict[str, Any] = {"model": engine, "engine": engine, "task": task}
    known["control"] = SimpleNamespace(directions={layer: np.ones(32, dtype=np.float32) for layer in (3, 2, 1)})
    known["steering"] = SimpleNamespace(layer_activations={layer: torch.ones(32) for layer in (0, 1)})
    for _, code in blocks:
        exec(code.replace("n_dev=6, n_test=6", "n_dev=2, n_test=2, max_new_tokens=2"), known)  # what is slow, smaller
    assert known["vectors"].layers == (0, 1)
    assert list(contents(tmp_path / "polite.gguf")[1]) == ["direction.1", "direction.2"]
