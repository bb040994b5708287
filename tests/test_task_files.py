"""Task files in the structures that public collections use, and records in memory. All content is made up."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

import tv_lens as tv
from tv_lens import Task
from tv_lens.tasks import readers

TOOLS = {"hammer": "nail", "brush": "paint", "needle": "thread", "pen": "ink", "saw": "wood"}
RECORDS = [{"input": tool, "output": use} for tool, use in TOOLS.items()]


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines(records: object) -> str:
    assert isinstance(records, list)
    return "\n".join(map(json.dumps, records)) + "\n"


def renamed(source: str, target: str, **more: object) -> list[dict[str, object]]:
    return [{source: tool, target: use, **more} for tool, use in TOOLS.items()]


def table(task: Task) -> dict[str, tuple[str, ...]]:
    return {text: task.answers(task.answer(text), text) for text in task.inputs}


def quietly(load: Callable[[], Task]) -> Task:
    """The task, and no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load()


ONE_EACH = {tool: (use,) for tool, use in TOOLS.items()}
WITH_THE = {tool: (use, f"the {use}") for tool, use in TOOLS.items()}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("object.json", TOOLS),
        ("pairs.json", [list(pair) for pair in TOOLS.items()]),
        ("records.json", RECORDS),
        ("reversed.json", [dict(reversed(record.items())) for record in RECORDS]),
        ("mixed_order.json", [RECORDS[0], *(dict(reversed(record.items())) for record in RECORDS[1:])]),
        ("case.json", renamed("Input", "OUTPUT ")),
        ("explained.json", renamed("input", "output", explanation="because", label="x")),
        ("lines.jsonl", lines(RECORDS)),
        ("pairs.jsonl", lines([list(pair) for pair in TOOLS.items()])),
        ("blank_lines.jsonl", "\ufeff" + lines(RECORDS).replace("\n", "\r\n\r\n")),
        ("source_target.jsonl", lines(renamed("source", "target", split="train"))),
        ("question_answer.jsonl", lines(renamed("question", "answer", id=7))),
        ("relation.json", {"properties": {"symmetric": False}, "samples": renamed("subject", "object")}),
        ("numbered.json", {"metadata": {"n": 5}, "examples": {str(i): each for i, each in enumerate(RECORDS)}}),
        ("big_bench.json", {"name": "x", "keywords": ["a", "b"], "examples": renamed("input", "target")}),
        ("one_part.json", {"data": {"train": RECORDS}}),
        ("columns.json", {"input": list(TOOLS), "output": list(TOOLS.values()), "id": [1, 2, 3, 4, 5]}),
        ("table.csv", "input,output\n" + "".join(f"{tool},{use}\n" for tool, use in TOOLS.items())),
        ("reversed.csv", "Output,Input\n" + "".join(f"{use},{tool}\n" for tool, use in TOOLS.items())),
        ("spaces.csv", "input , output\n\n" + "".join(f' {tool} ,  "{use} "\n ,\n' for tool, use in TOOLS.items())),
        ("semicolons.csv", "input;output\n" + "".join(f"{tool};{use}\n" for tool, use in TOOLS.items())),
        ("tabs.csv", "input\toutput\n" + "".join(f"{tool}\t{use}\n" for tool, use in TOOLS.items())),
        ("table.tsv", "source\ttarget\tid\n" + "".join(f"{tool}\t{use}\t1\n" for tool, use in TOOLS.items())),
    ],
)  # fmt: skip
def test_one_output_for_each_input(tmp_path: Path, name: str, content: object) -> None:
    path = write(tmp_path / name, content)
    task = quietly(lambda: Task.from_file(path))
    assert table(task) == ONE_EACH
    assert task.name == name.split(".")[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("object.json", {tool: [use, f"the {use}"] for tool, use in TOOLS.items()}),
        ("records.json", [{"input": tool, "output": [use, f"the {use}"]} for tool, use in TOOLS.items()]),
        (
            "instances.json",
            {
                "Definition": ["Say what the tool is for."],
                "Positive Examples": [{"input": "key", "output": "door", "explanation": "It opens it."}],
                "Negative Examples": [],
                "Instances": [{"id": "1", "input": tool, "output": [use, f"the {use}"]} for tool, use in TOOLS.items()],
            },
        ),
        (
            "scores.json",
            {
                "examples": [
                    {"input": tool, "target_scores": {use: 1, "sky": 0.5, f"the {use}": 1.0}}
                    for tool, use in TOOLS.items()
                ]
            },
        ),
    ],
)
def test_several_outputs_of_which_the_first_is_shown(tmp_path: Path, name: str, content: object) -> None:
    path = write(tmp_path / name, content)
    task = quietly(lambda: Task.from_file(path))
    assert table(task) == WITH_THE
    [prompt] = task.sample(1, shots=4, seed=0)
    assert all(output == TOOLS[tool] for tool, output in prompt.examples)


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("t.json", {"demon": RECORDS, "valid": RECORDS[:2], "test": RECORDS[:1]}, {"under": "demon"}),
        ("t.json", {"data": {"a.b": RECORDS, "c": RECORDS[:1]}}, {"under": "data.a.b"}),
        ("t.json", {"a": TOOLS, "b": {"x": "y"}}, {"under": "a"}),
        ("t.json", {"metadata": TOOLS, "rest": RECORDS[:1]}, {"under": "metadata"}),
        ("t.json", renamed("english", "german"), {"input": "english", "output": "german"}),
        ("t.json", renamed("english", "german"), {"input": "english"}),
        ("t.json", renamed("word", "german"), {"output": "german"}),
        ("t.json", renamed("output", "input"), {"input": "output", "output": "input"}),
        ("t.json", renamed("question", "answer", context="c"), {"input": "question", "output": "answer"}),
        ("t.json", {"en": list(TOOLS), "de": list(TOOLS.values())}, {"input": "en", "output": "de"}),
        ("t.json", [["x", use, tool] for tool, use in TOOLS.items()], {"input": 2, "output": 1}),
        ("t.json", {"1": renamed("a", "b")[0], **{str(i): each for i, each in enumerate(renamed("a", "b"))}},
         {"input": "a", "output": "b"}),
        ("t.csv", "id,tool,use\n" + "".join(f"1,{tool},{use}\n" for tool, use in TOOLS.items()),
         {"input": "tool", "output": "use"}),
        ("t.csv", "id,tool,use\n" + "".join(f"1,{tool},{use}\n" for tool, use in TOOLS.items()),
         {"input": 1, "output": "2", "header": True}),
        ("t.csv", "".join(f"1,{tool},{use}\n" for tool, use in TOOLS.items()),
         {"input": 1, "output": 2, "header": False}),
        ("t.csv", "tool,use\n" + "".join(f"{tool},{use}\n" for tool, use in TOOLS.items()), {"header": True}),
        ("t.csv", "".join(f"{tool},{use}\n" for tool, use in TOOLS.items()), {"header": False}),
        ("t.tsv", "de\ten\n" + "".join(f"{use}\t{tool}\n" for tool, use in TOOLS.items()),
         {"input": "en", "output": "de"}),
        ("t.csv", "input,output\n" + "".join(f"{tool},{use}\n" for tool, use in TOOLS.items()), {"header": True}),
    ],
)  # fmt: skip
def test_keywords_decide_what_cannot_be_guessed(
    tmp_path: Path, name: str, content: object, options: dict[str, Any]
) -> None:
    path = write(tmp_path / name, content)
    if options.get("header") is None:
        assert table(Task.from_file(path, **options)) == ONE_EACH
    else:
        assert table(quietly(lambda: Task.from_file(path, **options))) == ONE_EACH


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("t.json", renamed("english", "german", id=1), {},
         "the columns are 0 'english', 1 'german', 2 'id'; say which .*: input=..., output=..."),
        ("t.json", renamed("english", "german"), {}, "the columns are 0 'english', 1 'german'; say which"),
        ("t.json", renamed("question", "answer", context="c"), {}, "the columns are .*'context'; say which"),
        ("t.json", renamed("input", "text", label="x", answer="y"), {}, "the columns are .*; say which"),
        ("t.json", renamed("a", "b", c="x"), {"input": "a"}, "say which holds the outputs, too: output=..."),
        ("t.json", renamed("a", "b", c="x"), {"output": "a"}, "say which holds the inputs, too: input=..."),
        ("t.json", RECORDS, {"input": "tool"}, "there is no column 'tool'; the columns are 0 'input', 1 'output'"),
        ("t.json", RECORDS, {"input": "output", "output": 1}, "input and output are both the column 'output'"),
        ("t.json", RECORDS, {"output": 2}, "there is no column 2; the columns are"),
        ("t.json", RECORDS, {"header": True}, "header= is for tables"),
        ("t.json", RECORDS, {"under": "train"}, "there is no part 'train'; it has no parts"),
        ("t.jsonl", lines(RECORDS), {"under": "train"}, "under='train' picks a part of nested JSON"),
        ("t.csv", "a,b\n", {"under": "train"}, "under='train' picks a part of nested JSON"),
        ("t.json", {"demon": RECORDS, "test": RECORDS[:2]}, {},
         "holds several parts: 'demon' .5., 'test' .2.; pick one, such as under='demon'"),
        ("t.json", {"demon": RECORDS, "test": RECORDS[:2]}, {"under": "train"},
         "there is no part 'train'; there are 'demon' .5., 'test' .2."),
        ("t.json", {"x": {"demon": RECORDS, "test": TOOLS}}, {}, "parts: 'x.demon' .5., 'x.test' .5.; pick one"),
        ("t.json", {"x": {"demon": RECORDS, "test": TOOLS}}, {"under": "x.dev"}, "there is no part 'dev'"),
        ("t.json", {"country": ["a"] * 9, "capital": ["b"] * 9}, {},
         "'country', 'capital' hold 9 values each, so they seem to be columns; say which with input='...'"),
        ("t.json", {"input": ["a", "b"], "output": ["c"]}, {}, "'input', 'output' have different lengths: .1, 2."),
        ("t.json", [["a", "b"]], {"input": "x"}, "there is no column 'x'; the columns are 0, 1"),
        ("t.jsonl", "{}\n", {}, "the columns are ; say which"),
        ("t.jsonl", '{"input": "a"\n', {}, "line 1: .*delimiter"),
        ("t.csv", "1,hammer,nail\n2,brush,paint\n", {},
         "the first row is 0 '1', 1 'hammer', 2 'nail'; say which columns .*input=..., output=... .* header=False"),
        ("t.csv", "id,tool,use\n1,hammer,nail\n", {},
         "the columns are 0 'id', 1 'tool', 2 'use'; say which .*: input=..., output=..."),
        ("t.csv", "tool,use\nhammer,nail\n", {"input": "Tool"}, "there is no column 'Tool'; the columns are 0 'tool'"),
        ("t.csv", "use,use\nhammer,nail\n", {"input": "use"}, "2 columns are named 'use'; give its number"),
        ("t.csv", "output,thing\nhammer,nail\n", {}, "the columns are 0 'output', 1 'thing'; say which"),
        ("t.csv", "a;b,c\nd;e,f\n", {}, "the cells may be separated by ',' or ';'; put quotes around"),
        ("t.csv", "tool;use\nhammer;nail;2\nsaw\n", {}, "2 problems\n  line 2: .*not a pair.*\n  line 3: .*not a pair"),
    ],
)  # fmt: skip
def test_an_error_lists_what_there_is(
    tmp_path: Path, name: str, content: object, options: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(tv.TvLensError, match=message) as raised:
        Task.from_file(path, **options)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("positive", "negative", "before"),
    [("answer_matching_behavior", "answer_not_matching_behavior", "question"), ("chosen", "rejected", "prompt")],
)
def test_contrastive_pairs_are_refused_with_the_name_of_their_reader(
    tmp_path: Path, positive: str, negative: str, before: str
) -> None:
    records = [{before: f"Is a {tool} heavy?", positive: " Yes", negative: " No"} for tool in TOOLS]
    path = write(tmp_path / "t.json", records)
    with pytest.raises(tv.TvLensError, match=r"holds contrastive pairs .*tv_lens.ContrastivePairs.from_file"):
        Task.from_file(path)
    assert len(tv.ContrastivePairs.from_file(path)) == 5
    assert Task.from_file(path, input=before, output=positive).answer("Is a pen heavy?") == " Yes"


@pytest.mark.parametrize(
    ("name", "content", "read", "quoted"),
    [
        ("t.csv", "hot,cold\nbig,small\n", ("hot", "big"), "the first row .'hot', 'cold'. is read as data"),
        ("t.csv", "object;use\nhammer;nail\nsaw;wood\n", ("hammer", "saw"),
         "the first row .'object', 'use'. is read as the columns' names.*the first column is read as input"),
        ("t.tsv", "country\tcapital\nFrance\tParis\nSpain\tMadrid\nPeru\tLima\n", ("France", "Spain", "Peru"),
         "the first row .'country', 'capital'. is read as the columns' names"),
    ],
)  # fmt: skip
def test_an_unknown_first_row_is_quoted_in_a_warning(
    tmp_path: Path, name: str, content: str, read: tuple[str, ...], quoted: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.warns(tv.TvLensWarning, match=quoted):
        assert Task.from_file(path).inputs == read
    rows = [line.replace("\t", ",").replace(";", ",").split(",")[0] for line in content.splitlines()]
    assert quietly(lambda: Task.from_file(path, header=False)).inputs == tuple(rows)
    assert quietly(lambda: Task.from_file(path, header=True)).inputs == tuple(rows[1:])


def repeats() -> list[list[str]]:
    return [
        ["light", "heavy"],
        ["late", "early"],
        ["light", "dark"],
        ["late", "early"],
        ["lit", "dark"],
        ["light", "dark"],
    ]


JOINED = {"light": ("heavy", "dark"), "late": ("early",), "lit": ("dark",)}


def test_a_repeated_input_joins_its_outputs_with_one_warning(tmp_path: Path) -> None:
    as_object = "{" + ", ".join(f"{json.dumps(a)}: {json.dumps(b)}" for a, b in repeats()) + "}"
    records = [{"input": a, "output": b} for a, b in repeats()]
    series = pd.Series([b for _, b in repeats()], index=[a for a, _ in repeats()])
    loads: list[Callable[[], Task]] = [
        lambda: Task.from_file(write(tmp_path / "t.json", as_object)),
        lambda: Task.from_file(write(tmp_path / "r.json", records)),
        lambda: Task.from_file(write(tmp_path / "t.csv", "\n".join(map(",".join, [["input", "output"], *repeats()])))),
        lambda: Task.from_records("t", records),
        lambda: Task.from_records("t", repeats()),
        lambda: Task.from_records("t", series),
        lambda: Task.from_records("t", pd.DataFrame(records)),
    ]
    for load in loads:
        with pytest.warns(tv.TvLensWarning) as caught:
            task = load()
        assert table(task) == JOINED
        [warning] = caught
        for part in (
            "1 input is repeated with other outputs",
            "'light': 'heavy', 'dark'",
            "2 exact repeats are dropped",
        ):
            assert part in str(warning.message)
        # "dark" is right for "light", although "light" is not an alternative of "lit".
        assert task.right("dark", "heavy", query="light")
        assert not task.right("heavy", "dark", query="lit")


def test_one_first_output_may_have_other_alternatives_elsewhere(tmp_path: Path) -> None:
    rows = [["Ann", "piano"], ["Bob", "piano"], ["Ann", "flute"], ["Cem", "piano"], ["Cem", "drums"]]
    with pytest.warns(tv.TvLensWarning, match="2 inputs are repeated"):
        task = Task.from_file(write(tmp_path / "t.json", rows))
    assert table(task) == {"Ann": ("piano", "flute"), "Bob": ("piano",), "Cem": ("piano", "drums")}
    prompts = [tv.Prompt((), name) for name in ("Ann", "Bob", "Cem")]
    assert tv.score(task, prompts, ["flute"] * 3).correct == (True, False, False)


def test_numbers_become_their_text_with_a_warning(tmp_path: Path) -> None:
    records = '[{"input": 1, "output": 2.50}, {"input": "x", "output": 3}]'
    loads: list[Callable[[], Task]] = [
        lambda: Task.from_file(write(tmp_path / "t.json", records)),
        lambda: Task.from_file(write(tmp_path / "t.json", '{"1": 2.50, "x": [3]}')),
    ]
    for load in loads:
        with pytest.warns(tv.TvLensWarning, match=r"(2|3) numbers are read as text .such as '[12]"):
            assert table(load()) == {"1": ("2.50",), "x": ("3",)}
    frame = pd.DataFrame({"input": np.array([1, 2]), "output": np.array([0.5, 1.0], dtype=np.float32)})
    with pytest.warns(tv.TvLensWarning, match="4 numbers are read as text"):
        assert table(Task.from_records("t", frame)) == {"1": ("0.5",), "2": ("1.0",)}


def test_white_space_around_cells_is_dropped_and_in_json_it_is_kept(tmp_path: Path) -> None:
    cells = write(tmp_path / "t.csv", 'input,output\n hot ,\tcold \n big," small "\n')
    assert table(quietly(lambda: Task.from_file(cells))) == {"hot": ("cold",), "big": ("small",)}
    pairs = write(tmp_path / "t.json", [[" hot", "cold "], ["big", ["small", " little"]]])
    assert table(quietly(lambda: Task.from_file(pairs))) == {" hot": ("cold ",), "big": ("small", " little")}


@pytest.mark.parametrize(
    "bad",
    [
        {"input": ["hot", "big"], "output": ["cold", "small"]},
        {"input": "hot", "output": None},
        {"input": True, "output": "cold"},
        {"input": "hot", "output": []},
        {"input": "hot", "output": [["cold"]]},
        {"input": "hot", "output": {"cold": 1, "warm": 1}},
        {"input": "hot", "output": {"cold": "yes"}},
        {"input": "  ", "output": "cold"},
    ],
)
def test_a_record_that_is_not_a_pair_of_texts_is_refused(tmp_path: Path, bad: dict[str, Any]) -> None:
    path = write(tmp_path / "t.json", [*RECORDS, bad])
    with pytest.raises(tv.TvLensError, match="t.json, record 6: .* is not a pair of non-empty texts"):
        Task.from_file(path)
    with pytest.raises(tv.TvLensError, match="task 't', record 6: .* is not a pair of non-empty texts"):
        Task.from_records("t", [*RECORDS, bad])


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    bad: list[Any] = [{"input": "a"}, {"output": "b"}, ["c", "d"], {"input": "e", "output": ""}]
    path = write(tmp_path / "t.json", [*RECORDS, *bad])
    with pytest.raises(tv.TvLensError) as raised:
        Task.from_file(path)
    assert str(raised.value) == (
        f"{path}: 4 problems\n  record 6: {{'input': 'a'}} has no 'output'\n  record 7: {{'output': 'b'}} has no "
        "'input'\n  record 8: ['c', 'd'] is not a record, as the others are\n  record 9: ['e', ''] is not a pair of "
        "non-empty texts, input and output"
    )
    path = write(tmp_path / "t.csv", "input,output\n" + "x\n" * 2000 + "y,z\n")
    with pytest.raises(
        tv.TvLensError, match=r"2000 problems\n  line 2: (.|\n)* line 6: .*\n  and 1995 more$"
    ) as raised:
        Task.from_file(path)
    assert len(str(raised.value)) < 1000
    path = write(
        tmp_path / "t.json", '[{"input": "a", "input": "b", "output": "c"}, {"input": "\\ud800", "output": "x"}]'
    )
    with pytest.raises(tv.TvLensError, match=r"record 1: duplicate key (.|\n)*record 2: .*half of a surrogate pair"):
        Task.from_file(path)


def test_what_is_left_out_of_an_object_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", {"hot": "cold", "more": TOOLS})
    with pytest.warns(tv.TvLensWarning, match="the pairs under 'more' are read, 'hot' is not part of the task"):
        assert table(Task.from_file(path)) == ONE_EACH


# Records in memory


def test_records_of_every_kind_give_one_task() -> None:
    frame = pd.DataFrame(RECORDS, index=[7, 8, 9, 10, 11])
    kinds: list[Any] = [
        RECORDS,
        tuple(RECORDS),
        iter(RECORDS),
        list(TOOLS.items()),
        {"output": list(TOOLS.values()), "input": list(TOOLS)},
        datasets.Dataset.from_list(RECORDS),
        datasets.Dataset.from_list(RECORDS).to_iterable_dataset(),
        frame,
        frame[["output", "input"]],
        frame.set_index("input")["output"],
        pd.Series(TOOLS),
    ]
    for records in kinds:
        task = quietly(lambda records=records: Task.from_records("tools", records, category="things"))  # type: ignore[misc]
        assert (task.name, task.category, table(task)) == ("tools", "things", ONE_EACH)
        assert task.rule.name == "starts_with"
    lists = pd.Series({tool: np.array([use, f"the {use}"]) for tool, use in TOOLS.items()})
    assert table(Task.from_records("t", lists)) == WITH_THE
    columns = Task.from_records("t", renamed("word", "use", id=1), input="word", output="use", accepts=tv.exact_match)
    assert (table(columns), columns.accepts) == (ONE_EACH, tv.exact_match)
    with pytest.warns(tv.TvLensWarning, match="of the columns 0 'tool', 1 'use' the first is read as input"):
        assert table(Task.from_records("t", pd.DataFrame(renamed("tool", "use")))) == ONE_EACH


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ("tools.csv", "records are 'tools.csv'; pass a list of records, or read a file with Task.from_file"),
        (TOOLS, "a mapping of inputs to outputs; use Task.from_mapping"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)}), "a mapping of 'train'; pass one of its"),
        ({"input": ["a"], "output": ["b", "c"]}, "different lengths"),
        ([], "no pairs"),
        ([{"tool": "a", "use": "b"}], "the columns are 0 'tool', 1 'use'; say which"),
        (pd.DataFrame({"a": ["x"], "b": ["y"], "c": ["z"]}), "the columns are 0 'a', 1 'b', 2 'c'; say which"),
        (pd.DataFrame({"input": ["x", "y"], "output": ["y", np.nan]}, index=["p", "q"]), "row 'q': .* is not a pair"),
        (pd.DataFrame({"input": ["x"], "output": [pd.NA]}), "row 0: .* is not a pair"),
        (pd.Series(["y"], index=pd.MultiIndex.from_tuples([("a", "b")])), "row 1: .* is not a pair"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_records_that_are_not_pairs_are_refused(records: Any, message: str) -> None:
    with pytest.raises(tv.TvLensError, match=f"task 't'.*{message}"):
        Task.from_records("t", records)


def test_anything_else_is_not_records(as_users_run_it: None) -> None:
    thing: Any = 3
    with pytest.raises(tv.TvLensError, match="records are a int"):
        Task.from_records("t", thing)


def test_records_do_not_change_what_they_are_given() -> None:
    series = pd.Series([b for _, b in repeats()], index=[a for a, _ in repeats()])
    before = series.copy()
    records: list[Mapping[str, Any]] = [{"input": "a", "output": ["b", "c"]}, {"input": "a", "output": ["d"]}]
    with pytest.warns(tv.TvLensWarning):
        Task.from_records("t", series)
    with pytest.warns(tv.TvLensWarning):
        Task.from_records("t", records)
    pd.testing.assert_series_equal(series, before)
    assert records == [{"input": "a", "output": ["b", "c"]}, {"input": "a", "output": ["d"]}]


def test_a_reader_may_return_records_a_table_or_a_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_READERS", dict(readers._READERS))

    @readers.reader(".a")
    def records_of(text: str) -> list[readers.Located]:
        return [(f"word {i}", {"use": use, "tool": tool}) for i, (tool, use) in enumerate(TOOLS.items())]

    @readers.reader(".b")
    def table_of(text: str) -> readers.Table:
        return readers.Table([(f"word {i}", pair[::-1]) for i, pair in enumerate(TOOLS.items())], ("use", "tool"))

    @readers.reader(".c")
    def tree_of(text: str) -> readers.Tree:
        return readers.Tree(readers.Object([("x", readers.Object(TOOLS.items())), ("y", [["a", "b"]])]))

    for name, options in (("t.a", {}), ("t.b", {}), ("t.c", {"under": "x"})):
        path = write(tmp_path / name, "")
        columns = {} if options else {"input": "tool", "output": "use"}
        assert table(quietly(lambda path=path, how={**options, **columns}: Task.from_file(path, **how))) == ONE_EACH  # type: ignore[misc]
    with pytest.raises(tv.TvLensError, match="t.a: the columns are 0 'use', 1 'tool'; say which"):
        Task.from_file(tmp_path / "t.a")
    with pytest.raises(tv.TvLensError, match="t.c: holds several parts: 'x' .5., 'y' .1."):
        Task.from_file(tmp_path / "t.c")
