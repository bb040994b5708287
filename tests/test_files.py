"""Files of other people, and damaged ones: the right result, or one clear error that names the file."""

from __future__ import annotations

import copy
import csv
import io
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from models import Twins, make_twins
from results import make_settings
from safetensors.torch import save

import tv_lens as tv
from tv_lens.evidence.results import Evaluation, Experiment, Score, Sweep, TaskResult
from tv_lens.files import from_json, to_json

# How many damaged copies of each file are tried; more for a long run.
ROUNDS = int(os.environ.get("TV_LENS_FUZZ", "400"))

PAIRS = {"hot": "cold", "größe": 'a, "b"\n{c}', "北": "南", " x ": "🦊", "a\tb": "\u202eabc"}
VECTORS = tv.TaskVectors(
    torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)),
    "tiny",
    "größe",
    tv.Template("Q: {input}\nA: {output}"),
    ("Q: a\nA:", "é{}"),
    (("b", "c"), ("d", "e")),
    "extract",
    True,
    {"torch": "9.9"},
)


def experiment() -> Experiment:
    right = Score(("A", "é"), ("A", "B"), (True, False))
    wrong = Score(("", "x"), ("A", "B"), (False, False))
    result = TaskResult(
        "größe",
        "own",
        Sweep((0, 2), (wrong, right)),
        Evaluation(2, wrong, right, right, {"random": wrong}),
        None,
        ("a ->", "b ->"),
        ("c ->", "d ->"),
        ("c", "d"),
    )
    return Experiment(make_settings(tasks=("größe",), layers=(0, 2)), (result,))


def damaged(content: bytes, rounds: int, seed: int) -> Iterator[bytes]:
    """Truncated at every byte; then with bytes or bits changed, inserted or removed, or a piece repeated."""
    draw = random.Random(seed)
    yield from (content[:kept] for kept in range(0, len(content), max(1, len(content) // rounds)))
    special = (b"\0", b'"', b"{", b"[", b"\xff", b"\xef\xbb\xbf", b"\r", b"\\ud800", b"NaN", b"9" * 5000, b",", b"\n")
    for _ in range(rounds):
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 1, 2, 10))):
            at = draw.randrange(len(changed))
            kind = draw.randrange(5)
            if kind == 0:
                changed[at] ^= 1 << draw.randrange(8)
            elif kind == 1:
                changed[at] = draw.randrange(256)
            elif kind == 2:
                changed[at:at] = draw.choice(special)
            elif kind == 3:
                del changed[at : at + draw.randint(1, 9)]
            else:
                changed[at:at] = changed[draw.randrange(len(changed)) :][:20]
            if not changed:
                break
        yield bytes(changed)


def retyped(data: Any) -> Iterator[Any]:
    """The same JSON with each of its values in turn replaced by another type or removed."""
    others: tuple[Any, ...] = (None, True, 3, -1, 1.5, 10**30, "text", "", [], {}, ["text"], [1], {"text": 1}, [[]])
    places: list[tuple[Any, ...]] = []

    def visit(value: Any, at: tuple[Any, ...]) -> None:
        places.append(at)
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, each in inside:
            visit(each, (*at, key))

    visit(data, ())
    for at in places:
        for other in (*others, ...):
            changed = copy.deepcopy(data)
            if not at:
                yield None if other is ... else other
                continue
            holder = changed
            for key in at[:-1]:
                holder = holder[key]
            if other is ...:
                del holder[at[-1]]
            else:
                holder[at[-1]] = other
            yield changed


def read(load: Callable[[Path], Any], path: Path, content: bytes) -> Any:
    """What was loaded; None if the file was refused with a short error that names it."""
    path.write_bytes(content)
    try:
        return load(path)
    except (ValueError, OSError) as error:
        said = str(error)
    assert path.name in said
    assert len(said) < 2500, f"an error of {len(said)} characters"
    assert said == said.encode(errors="replace").decode()  # can be printed
    return None


# Tasks


def written(kind: str) -> bytes:
    if kind == "json":
        return json.dumps(PAIRS, ensure_ascii=False).encode()
    out = io.StringIO(newline="")
    csv.writer(out).writerows(PAIRS.items())
    return out.getvalue().encode()


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_a_damaged_task_gives_pairs_of_texts_or_names_the_file(tmp_path: Path, kind: str) -> None:
    refused = 0
    for content in damaged(written(kind), ROUNDS, seed=1):
        task = read(tv.Task.from_file, tmp_path / f"t.{kind}", content)
        refused += task is None
        if task is not None:
            assert len(task) == len(set(task.inputs)) > 0
            for text in task.inputs:
                # Whatever was read can be shown to a model and written down.
                assert text.strip()
                assert task.answer(text).strip()
                (text + task.answer(text)).encode()
    assert refused > ROUNDS / 4


def test_json_of_other_types_is_not_a_task(tmp_path: Path) -> None:
    for data in retyped([["hot", "cold"], ["big", ["small", "little"]]]):
        task = read(tv.Task.from_file, tmp_path / "t.json", json.dumps(data).encode())
        if task is not None:
            pairs = data.items() if isinstance(data, dict) else data
            assert task.inputs == tuple(str(pair[0]) for pair in pairs)  # a number becomes its text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.json", b"\xef\xbb\xbf" + written("json")),
        ("bom.csv", b"\xef\xbb\xbf" + written("csv")),
        ("crlf.json", json.dumps(PAIRS, indent=1).replace("\n", "\r\n").encode()),
        ("crlf.csv", b"input,output\r\n" + written("csv")),
        ("pair.json", json.dumps({**PAIRS, "fox": "🦊"}).encode()),  # a whole surrogate pair, as JSON escapes it
    ],
)
def test_the_same_pairs_however_they_are_written(tmp_path: Path, name: str, content: bytes) -> None:
    task = read(tv.Task.from_file, tmp_path / name, content)
    expected = PAIRS | {"fox": "🦊"} if "pair" in name else PAIRS
    if name.endswith(".csv"):  # white space around cells is dropped
        expected = {text.strip(): answer.strip() for text, answer in expected.items()}
    assert {text: task.answer(text) for text in task.inputs} == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "a,b\n".encode("utf-16"), "not UTF-8"),
        ("t.csv", "a,b\n".encode("utf-16-le"), "NUL characters; is it UTF-16"),
        ("t.csv", b"a\0b,c\n", "NUL characters"),
        ("t.json", '{"a": "b"}'.encode("utf-16"), "not UTF-8"),
        ("t.json", b'{"\\ud800": "b"}', r"'\\ud800' holds half of a surrogate pair, which is not a character"),
        ("t.json", b'{"a": ["b", "\\udfff"]}', r"'\\udfff' holds half of a surrogate pair"),
        ("t.json", b'{"a": NaN}', "key 1: .'a', nan. is not a pair"),
        ("t.json", b'{"a": -Infinity}', "key 1: .'a', -inf. is not a pair"),
        ("t.json", b'{"a": ' + b"1" * 4000 + b"}", "key 1: .* is not a pair"),
        ("t.json", b'{"a": ' + b"1" * 5000 + b"}", "t.json: .*limit"),
        ("t.json", b'{"a": ' * 450 + b"1" + b"}" * 450, "key 1: .* is not a pair"),
        ("t.json", b'{"a": ' + b"[" * 700 + b"]" * 700 + b"}", "key 1: .* is not a pair"),
        ("t.json", b'{"a": ' * 50_000, "nested too deeply"),
        ("t.json", json.dumps([["a" * 10**6, "b"], ["a" * 10**6, ""]]).encode(), "pair 2: .* is not a pair"),
        ("t.csv", b"a," + b"b" * 10**6, "line 1: field larger than field limit"),
        ("t.csv", b"a,b\n" + b"c" * 10**5 + b"\n", "line 2: .* is not a pair"),
    ],
)
def test_a_file_that_is_not_a_task_gives_a_short_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        tv.Task.from_file(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_a_lone_surrogate_is_refused_wherever_a_task_comes_from() -> None:
    makers: tuple[Callable[[], tv.Task], ...] = (
        lambda: tv.Task("t", ("a", "b\udc00"), str.upper),
        lambda: tv.Task("t\udcff", ("a", "b"), str.upper),
        lambda: tv.Task.from_mapping("t", {"a": "\ud83e"}),
        lambda: tv.Task.from_mapping("t", {"a": ["b", "\ud83e"]}),
    )
    for make in makers:
        with pytest.raises(ValueError, match="holds half of a surrogate pair"):
            make()


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such names")
def test_a_file_name_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.json"))
    try:
        path.write_text('{"a": "b"}')
    except OSError:
        pytest.skip("nor has this disk")
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        tv.Task.from_file(path)


@pytest.mark.parametrize(
    "name", ["t.json", "t.csv", "t.safetensors", "none\0.json", "missing/t.csv", "x" * 300 + ".csv"]
)
def test_folders_and_missing_files_are_clear_errors(tmp_path: Path, name: str) -> None:
    for made in ("t.json", "t.csv", "t.safetensors"):
        (tmp_path / made).mkdir()
    load = tv.TaskVectors.load if name.endswith("safetensors") else tv.Task.from_file
    for read_it in (load, tv.TaskVectors.load, tv.Experiment.load):
        with pytest.raises((OSError, ValueError)) as raised:
            read_it(tmp_path / name)
        assert name[:20].rstrip("\0") in str(raised.value).replace("\\x00", "\0")


# Vectors


def vectors_in(path: Path, content: bytes) -> tv.TaskVectors | None:
    vectors: tv.TaskVectors | None = read(tv.TaskVectors.load, path, content)
    return vectors


def with_header(content: bytes, ours: Any) -> bytes:
    """The file with another header of ours and no checksum: safetensors writes a length, then JSON, then numbers."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    if isinstance(ours, dict):
        ours = {name: value for name, value in ours.items() if name != "sha256"}
    header["__metadata__"] = {"tv_lens": ours if isinstance(ours, str) else json.dumps(ours)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def test_damaged_vectors_are_read_correctly_or_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    VECTORS.save(path)
    content = path.read_bytes()
    refused = 0
    for kept in range(len(content)):
        assert vectors_in(path, content[:kept]) is None
    for changed in damaged(content, ROUNDS, seed=2):
        actual = vectors_in(path, changed)
        refused += actual is None
        if actual is not None:
            assert torch.equal(actual.values, VECTORS.values)
            assert (actual.model, actual.task, actual.prompts) == (VECTORS.model, VECTORS.task, VECTORS.prompts)
    assert refused > ROUNDS / 2


def test_a_changed_number_or_word_does_not_fit_the_checksum(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    VECTORS.save(path)
    content = path.read_bytes()
    for changed in (content[:-1] + bytes([content[-1] ^ 1]), content.replace(b"extract", b"extrict")):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"v.safetensors: damaged: its content does not match its checksum"):
            tv.TaskVectors.load(path)


def test_the_same_vectors_are_the_same_file(tmp_path: Path) -> None:
    for name in "abcdef":
        VECTORS.save(tmp_path / name)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_file_without_a_checksum_is_read(tmp_path: Path) -> None:
    """As the first versions wrote them."""
    VECTORS.save(tmp_path / "v.safetensors")
    content = (tmp_path / "v.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    ours = json.loads(content[8 : 8 + length])["__metadata__"]["tv_lens"]
    actual = vectors_in(tmp_path / "v.safetensors", with_header(content, json.loads(ours)))
    assert actual is not None
    assert torch.equal(actual.values, VECTORS.values)


def test_a_header_of_other_types_is_refused_or_right(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    VECTORS.save(path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    ours = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["tv_lens"])
    for changed in retyped(ours):
        actual = vectors_in(path, with_header(content, changed))
        if actual is not None:  # one text replaced by another, or one list of texts
            assert isinstance(actual.task, str)
            assert isinstance(actual.model, str)
            assert actual.prepend_bos in (None, True, False)
            assert not isinstance(actual.prepend_bos, int) or isinstance(actual.prepend_bos, bool)
            assert all(isinstance(text, str) for text in actual.prompts)
            assert list(actual.prompts) == changed["prompts"]
            assert [list(queries) for queries in actual.substitutes] == changed["substitutes"]
    for text in ("[" * 100_000, '{"format": 1, "format": 1}', '{"format": NaN}', '{"format": ' + "1" * 5000 + "}"):
        assert vectors_in(path, with_header(content, text)) is None


def test_nan_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    for values in (torch.full((1, 2, 3), torch.nan), torch.full((1, 2, 3), torch.inf), torch.zeros(0, 2, 3)):
        VECTORS.save(path)
        ours = json.loads(_header_text(path))
        del ours["sha256"]
        assert vectors_in(path, save({"values": values}, {"tv_lens": json.dumps(ours)})) is None


def _header_text(path: Path) -> str:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return str(json.loads(content[8 : 8 + length])["__metadata__"]["tv_lens"])


class Trap:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_file_is_run(tmp_path: Path) -> None:
    """Pickles, plain and as torch writes them, under every name that is read."""
    import pickle

    sprung = tmp_path / "sprung"
    torch.save({"values": Trap(sprung)}, tmp_path / "torch.pt")
    contents = (pickle.dumps(Trap(sprung)), (tmp_path / "torch.pt").read_bytes())
    for content in contents:
        for load, name in (
            (tv.Task.from_file, "t.json"),
            (tv.Task.from_file, "t.csv"),
            (tv.TaskVectors.load, "v.safetensors"),
            (tv.Experiment.load, "e.json"),
        ):
            assert read(load, tmp_path / name, content) is None
    assert not sprung.exists()
    pickle.loads(contents[0])  # the trap works
    assert sprung.exists()


# Experiments


def test_a_damaged_experiment_is_usable_or_names_the_file(tmp_path: Path) -> None:
    experiment().save(tmp_path / "e.json")
    content = (tmp_path / "e.json").read_bytes()
    refused = 0
    for changed in damaged(content, ROUNDS // 2, seed=3):
        actual = read(tv.Experiment.load, tmp_path / "e.json", changed)
        refused += actual is None
        if actual is not None:
            assert len(actual.to_pandas()) == sum(len(each.evaluation.conditions) for each in actual.results)
            assert len(actual.summary()) == len(actual.results)
    assert refused > ROUNDS / 8


@pytest.mark.slow
def test_an_experiment_of_other_types_is_usable_or_names_the_file(tmp_path: Path) -> None:
    experiment().save(tmp_path / "e.json")
    read_back = 0
    for changed in retyped(json.loads((tmp_path / "e.json").read_bytes())):
        actual = read(tv.Experiment.load, tmp_path / "e.json", json.dumps(changed).encode())
        if actual is not None:
            read_back += 1
            [result] = actual.results
            assert result.sweep.best in result.sweep.layers
            assert actual.to_pandas()["n"].tolist() == [2] * (3 + len(result.evaluation.controls))
            assert isinstance(actual._repr_html_(), str)
            for each in (*result.sweep.scores, *result.evaluation.conditions.values()):
                assert all(isinstance(text, str) for text in (*each.texts, *each.answers))
                assert len(each.texts) == len(each.correct) == 2
    assert read_back > 100  # one text replaced by another


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_an_experiment_in_another_encoding_is_the_same(tmp_path: Path, encoding: str) -> None:
    experiment().save(tmp_path / "e.json")
    (tmp_path / "e.json").write_bytes((tmp_path / "e.json").read_bytes().decode().encode(encoding))
    assert tv.Experiment.load(tmp_path / "e.json") == experiment()


def test_lone_surrogates_survive_saving(tmp_path: Path) -> None:
    """A custom function may return anything; an hour's work must not be lost because of it."""
    [result], text = experiment().results, "\ud800 and \\ud800 and 🦊"
    score = Score((text, "b"), (text, "B"), (True, False))
    odd = TaskResult(
        "t",
        "",
        Sweep((1,), (score,)),
        Evaluation(1, score, score, score, {}),
        None,
        (text, text),
        (text, text),
        ("c", "d"),
    )
    Experiment(experiment().settings, (odd, result)).save(tmp_path / "e.json")
    (tmp_path / "e.json").read_bytes().decode("utf-8")
    assert tv.Experiment.load(tmp_path / "e.json").results == (odd, result)
    tv.TaskVectors(torch.ones(1, 2, 3), "m", text).save(tmp_path / "v.safetensors")
    assert tv.TaskVectors.load(tmp_path / "v.safetensors").task == text
    assert from_json(to_json({text: [text]})) == {text: [text]}


def test_ambiguous_json_is_refused() -> None:
    for wrong in ('{"a": 1, "a": 2}', '[{"b": {"a": 1, "a": 1}}]', "NaN", "[-Infinity]", "[" * 100_000):
        with pytest.raises(ValueError, match=r"duplicate key|is not a JSON number|nested too deeply"):
            from_json(wrong)


# A run's folder

WORDS = tv.Task("upper", tuple("abcdefgh"), str.upper)
SMALL: dict[str, Any] = {"shots": 1, "n_dev": 2, "n_test": 2, "substitutes": 1, "max_new_tokens": 1, "layers": [0, 3]}


@pytest.fixture(scope="module")
def llama() -> Twins:
    return make_twins("llama")


@pytest.fixture
def folder(llama: Twins, tmp_path: Path) -> Path:
    tv.run_experiment(llama.bridge, [WORDS], **SMALL, folder=tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["settings.json", "task-upper.json", "task-upper.safetensors"])
def test_a_damaged_file_in_a_runs_folder_is_named(llama: Twins, folder: Path, name: str) -> None:
    good = (folder / name).read_bytes()
    whole = tv.run_experiment(llama.bridge, [WORDS], **SMALL, folder=folder)
    wrong = [b"", b"[]", b"{}", b"null", b"3", b'"text"', b"[" * 100_000, b"\xff\xfe", good[:-7], good[7:], b"NaN"]
    draw = random.Random(4)
    wrong += [good[: draw.randrange(len(good) - 2)] for _ in range(10)]
    for content in wrong:
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{folder.name}") as raised:
            tv.run_experiment(llama.bridge, [WORDS], **SMALL, folder=folder)
        assert name in str(raised.value) or "other settings" in str(raised.value)
    (folder / name).write_bytes(good)
    assert tv.run_experiment(llama.bridge, [WORDS], **SMALL, folder=folder) == whole


def test_a_folder_where_a_file_should_be_is_named(llama: Twins, folder: Path) -> None:
    for name in ("settings.json", "task-upper.json", "task-upper.safetensors"):
        (folder / name).rename(folder / "aside")
        (folder / name).mkdir()
        with pytest.raises(OSError, match=name):
            tv.run_experiment(llama.bridge, [WORDS], **SMALL, folder=folder)
        (folder / name).rmdir()
        (folder / "aside").rename(folder / name)


def test_another_tasks_result_is_refused(llama: Twins, folder: Path) -> None:
    kept = folder / "task-upper.json"
    kept.write_bytes(kept.read_bytes().replace(b'"task": "upper"', b'"task": "lower"'))
    with pytest.raises(ValueError, match=r"task-upper.json: a damaged result .*of the task 'lower', not 'upper'"):
        tv.run_experiment(llama.bridge, [WORDS], **SMALL, folder=folder)


def test_the_table_of_a_saved_experiment_is_read_by_pandas(tmp_path: Path) -> None:
    experiment().save(tmp_path / "e.parquet")
    assert pd.read_parquet(tmp_path / "e.parquet")["task"].tolist() == ["größe"] * 4
