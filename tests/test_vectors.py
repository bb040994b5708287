from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import types
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from safetensors.torch import save

import tv_lens as tv
from tv_lens import TaskVectors, Template
from tv_lens.files import write_whole
from tv_lens.vector_files import FORMAT

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
    """Otherwise the tests below would fail for another reason."""
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
        load(tmp_path, save({"values": torch.full((3, 4, 5), torch.nan)}, header))


def test_a_newer_format_says_to_upgrade(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=rf"written in format {FORMAT + 1} by a newer tv_lens; .* upgrade"):
        load(tmp_path, with_header(content, format=FORMAT + 1, task=...))


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


@pytest.mark.skipif(os.name != "posix", reason="links and modes of POSIX")
def test_links_and_file_modes_are_kept(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"first")
    real.chmod(0o600)
    link.symlink_to(real)
    write_whole(link, b"second")
    assert link.is_symlink()
    assert real.read_bytes() == b"second"
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "later")
    write_whole(dangling, b"third")
    assert (dangling.is_symlink(), (tmp_path / "later").read_bytes()) == (True, b"third")
    (tmp_path / "plain").touch()
    new = tmp_path / "new"
    write_whole(new, b"")
    assert new.stat().st_mode == (tmp_path / "plain").stat().st_mode  # what the umask gives


@pytest.mark.parametrize("length", [1, 200, 255])
def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path, length: int) -> None:
    write_whole(tmp_path / ("x" * length), b"content")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"content"]


def test_where_vectors_are_written_goes_through_a_file(tmp_path: Path) -> None:
    made = replace(
        VECTORS,
        site=tv.MLP_OUT,
        op="add",
        layers=(1, 3, 6, 7),
        n_layers=9,
        options={"k": [1, 2.5, None, "x"]},
        bos="<s>",
    )
    made.save(tmp_path / "v.safetensors")
    loaded = TaskVectors.load(tmp_path / "v.safetensors")
    for each in fields(TaskVectors):
        if each.name != "values":
            assert getattr(loaded, each.name) == getattr(made, each.name)
    assert loaded.provenance == made.provenance


def test_a_file_of_version_0_1_is_read(tmp_path: Path, content: bytes) -> None:
    """Its header has fewer entries; what it does not say is what 0.1 always did."""
    header, numbers = header_of(content)
    ours = json.loads(header["__metadata__"]["tv_lens"])
    old = {
        name: ours[name] for name in ("model", "task", "prompts", "substitutes", "method", "prepend_bos", "versions")
    }
    old |= {"format": 1, "template": {"example": "Q: {input} {x}\nA: {output}", "separator": "\n\n"}}
    shape = list(VECTORS.values.shape)
    described = json.dumps([old, shape], ensure_ascii=False).encode()
    old["sha256"] = hashlib.sha256(described + VECTORS.values.numpy().tobytes()).hexdigest()
    header["__metadata__"]["tv_lens"] = json.dumps(old, ensure_ascii=False)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    loaded = load(tmp_path, struct.pack("<Q", len(text)) + text + numbers)
    assert torch.equal(loaded.values, VECTORS.values)
    assert (loaded.site, loaded.op, loaded.layers, loaded.n_layers) == (tv.RESID_POST, "set", (0, 1, 2, 3), 4)
    assert (loaded.template, loaded.task, loaded.bos) == (VECTORS.template, VECTORS.task, None)


# Arithmetic


def made(task: str, values: list[list[float]], **changes: Any) -> TaskVectors:
    """Vectors of one layer, from prompts named after the task."""
    prompts = tuple(f"{task} {i}" for i in range(len(values)))
    whole = {"template": Template(), "prompts": prompts, "substitutes": tuple((f"s{i}",) for i in range(len(values)))}
    return TaskVectors(
        torch.tensor(values)[:, None], model="tiny", task=task, **{**whole, "versions": {"torch": "1"}, **changes}
    )


A, B = made("a", [[1.0, 2.0], [3.0, 4.0]]), made("b", [[10.0, 20.0], [30.0, 50.0]])


def test_arithmetic_goes_vector_by_vector() -> None:
    assert (A + B).values.tolist() == [[[11.0, 22.0]], [[33.0, 54.0]]]
    assert (B - A).values.tolist() == [[[9.0, 18.0]], [[27.0, 46.0]]]
    assert (A * 2).values.tolist() == (2 * A).values.tolist() == [[[2.0, 4.0]], [[6.0, 8.0]]]
    assert (-A).values.tolist() == [[[-1.0, -2.0]], [[-3.0, -4.0]]]
    # A mean is one vector; it is combined with each vector of the other side.
    assert (B - A.mean()).values.tolist() == [[[8.0, 17.0]], [[28.0, 47.0]]]
    assert (A.mean() + B).values.tolist() == [[[12.0, 23.0]], [[32.0, 53.0]]]
    assert A.values.tolist() == [[[1.0, 2.0]], [[3.0, 4.0]]]  # as it was


def test_what_arithmetic_makes_says_what_it_was_made_of(tmp_path: Path) -> None:
    made_of = A.mean() + 0.5 * (B.mean() - A.mean())
    assert made_of.task == "a + (0.5 * (b - a))"
    assert made_of.method == "mean of extract + (0.5 * (mean of extract - mean of extract))"
    assert made_of.prompts == ("a 0", "a 1", "b 0", "b 1")  # each once
    assert made_of.substitutes == (("s0",), ("s1",)) * 2
    assert (A * 0.12345678).task == "0.12345678 * a"
    assert (made_of.model, made_of.template, made_of.versions) == ("tiny", Template(), {"torch": "1"})
    assert (A - B).mean().method == "mean of (extract - extract)"
    made_of.save(tmp_path / "v.safetensors")
    loaded = TaskVectors.load(tmp_path / "v.safetensors")
    assert torch.equal(loaded.values, made_of.values)
    assert (loaded.task, loaded.prompts, loaded.versions) == (made_of.task, made_of.prompts, made_of.versions)


@pytest.mark.parametrize(("one", "other", "both"), [(True, False, None), (False, True, None), (True, True, True)])
def test_a_sum_claims_a_bos_only_if_both_sides_have_it(one: bool, other: bool, both: bool | None) -> None:
    sides = [replace(vectors, prepend_bos=bos, bos="<s>" if bos else "") for vectors, bos in ((A, one), (B, other))]
    for joined in (sides[0] + sides[1], sides[0] - sides[1]):
        assert joined.prepend_bos is both
        assert joined.bos == ("<s>" if both else None)
        assert joined.template == Template()


def test_provenance_is_a_sum_of_terms() -> None:
    made = A.mean() + 0.5 * (B.mean() - A.mean())
    assert [(term.factor, term.task, term.method) for term in made.terms] == [
        (1.0, "a", "mean of extract"),
        (0.5, "b", "mean of extract"),
        (-0.5, "a", "mean of extract"),
    ]
    assert (
        str(made.provenance)
        == "1 * a (mean of extract) + 0.5 * b (mean of extract) + -0.5 * a (mean of extract), of tiny"
    )
    # A task's own name may look like a formula; only sums and multiples get parentheses.
    named = replace(A, task="x - y", terms=())
    assert (named + B).task == "x - y + b"
    assert (2 * (named + B)).task == "2 * (x - y + b)"


def test_vectors_of_two_sites_cannot_be_added() -> None:
    with pytest.raises(ValueError, match="vectors of resid_post .* and of mlp_out .* do not go together"):
        A + replace(B, site=tv.MLP_OUT)
    assert (A + replace(B, op="add")).op == "add"


def test_a_sum_claims_only_what_both_sides_share() -> None:
    other = replace(B, template=None, prepend_bos=True, substitutes=(), versions={"torch": "2", "numpy": "3"})
    for joined in (A + other, A - other):
        assert (joined.template, joined.prepend_bos) == (None, None)
        assert joined.versions == {"torch": "1 and 2", "numpy": "3"}
        assert joined.substitutes == (("s0",), ("s1",), (), ())  # still a row for each prompt
    assert (A + 0.5 * (other - A)).versions["torch"] == "1 and 2"


def test_wrong_arithmetic_says_what_to_do(as_users_run_it: None) -> None:
    with pytest.raises(ValueError, match=r"vectors of tiny .* and of large .*1 layers, d_model 2.* extract both"):
        A + replace(B, model="large")
    with pytest.raises(ValueError, match="do not go together"):
        A - TaskVectors(torch.zeros(2, 1, 3), "tiny", "wide")
    with pytest.raises(ValueError, match="2 and 3 vectors cannot be paired; .* mean"):
        A + made("c", [[0.0, 0.0]] * 3)
    for factor in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="multiply by a finite number"):
            A * factor
    with pytest.raises(ValueError, match="NaN or infinity"):
        made("large", [[3e38, 1.0]]) * 10
    a: Any = A
    wrong: tuple[Callable[[], object], ...] = (
        lambda: a + 1,
        lambda: a * "2",
        lambda: a * B,
        lambda: a * True,
        lambda: a - torch.ones(2),
    )
    for call in wrong:
        with pytest.raises(TypeError):
            call()


def test_a_table_holds_each_vectors_length() -> None:
    vectors = TaskVectors(torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[6.0, 8.0], [0.0, 0.0]]]), "tiny", "t")
    table = vectors.to_pandas()
    assert table["prompt"].tolist() == [0, 0, 1, 1]
    assert table["layer"].tolist() == [0, 1, 0, 1]
    assert table["depth"].tolist() == [0.5, 1.0, 0.5, 1.0]
    assert table["norm"].tolist() == [5.0, 1.0, 10.0, 0.0]


def test_a_notebook_shows_where_vectors_come_from() -> None:
    shown = replace(VECTORS, task="<script>")._repr_html_()
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown
    for text in (
        "tiny",
        "3, of 4 layers and d_model 5",
        "3 prompts, 6 substitute queries",
        "not prepended",
        "torch 9.9",
    ):
        assert text in shown


# The hub, which no test can reach: what is called is checked against huggingface_hub's own signatures.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """An in-memory stand-in for the hub."""
    import huggingface_hub

    state: dict[str, Any] = {"files": {}, "made": []}

    def create_repo(self: Any, repo_id: str, **options: Any) -> None:
        state["made"].append((repo_id, options, self.token))

    def upload_file(self: Any, **call: Any) -> Any:
        state["files"][call["repo_id"], call["path_in_repo"], call["revision"]] = call["path_or_fileobj"]
        state["message"] = call["commit_message"]
        return types.SimpleNamespace(commit_url="https://hub/commit/1")

    def download(repo_id: str, filename: str, *, revision: str | None = None, token: str | None = None) -> str:
        path = tmp_path / "downloaded"
        path.write_bytes(state["files"][repo_id, filename, revision])
        return str(path)

    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "create_repo", create_autospec(api.create_repo, side_effect=create_repo))
    monkeypatch.setattr(api, "upload_file", create_autospec(api.upload_file, side_effect=upload_file))
    fetch = huggingface_hub.hf_hub_download
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", create_autospec(fetch, side_effect=download))
    return state


def test_the_hub_keeps_what_a_file_keeps(hub: dict[str, Any]) -> None:
    assert VECTORS.push_to_hub("me/vectors", private=True, token="hf_x") == "https://hub/commit/1"
    assert hub["made"] == [("me/vectors", {"private": True, "exist_ok": True}, "hf_x")]
    assert hub["message"] == "Task vectors of größe, tiny"
    A.push_to_hub("me/vectors", "a.safetensors", revision="v2")
    first = TaskVectors.from_hub("me/vectors")
    second = TaskVectors.from_hub("me/vectors", "a.safetensors", revision="v2")
    assert torch.equal(first.values, VECTORS.values)
    assert (first.task, first.prompts) == (VECTORS.task, VECTORS.prompts)
    assert torch.equal(second.values, A.values)


def test_another_file_from_the_hub_is_refused(hub: dict[str, Any]) -> None:
    hub["files"]["me/model", "task_vectors.safetensors", None] = b"\x80\x04K\x01." * 20
    with pytest.raises(ValueError, match="not a safetensors file"):
        TaskVectors.from_hub("me/model")


def test_without_the_hub_the_error_says_so() -> None:
    """HF_HUB_OFFLINE is set, so this reaches huggingface_hub's own refusal and no network."""
    with pytest.raises(OSError, match="(?i)offline|cannot find"):
        TaskVectors.from_hub("me/vectors")
    with pytest.raises(OSError, match="(?i)offline"):
        VECTORS.push_to_hub("me/vectors")
