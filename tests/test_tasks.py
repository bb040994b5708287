from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import make_twins

from tv_lens import Task, Template, exact_match, first_token, starts_with

WORDS = [f"w{i}" for i in range(30)]
TASK = Task("upper", tuple(WORDS), str.upper)


def test_a_prompt_never_shows_its_query_nor_an_example_twice() -> None:
    for seed in range(20):
        prompts = TASK.sample(30, shots=10, seed=seed)
        assert sorted(prompt.query for prompt in prompts) == sorted(WORDS)
        for prompt in prompts:
            shown = [example.input for example in prompt.examples]
            assert len({prompt.query, *shown}) == 11
            assert all(output == text.upper() for text, output in prompt.examples)
            assert (prompt.answer, prompt.task) == (prompt.query.upper(), "upper")


def test_a_substitute_is_neither_query_nor_demonstration() -> None:
    for seed in range(20):
        prompts = TASK.sample(30, shots=10, seed=seed)
        for prompt, queries in zip(prompts, TASK.substitutes(prompts, 19, seed=seed), strict=True):
            assert len({prompt.query, *(example.input for example in prompt.examples), *queries}) == 30


def test_split_parts_share_nothing_and_lose_nothing() -> None:
    dev, test = TASK.split(0.4, seed=1)
    assert (len(dev), len(test)) == (12, 18)
    assert {*dev.inputs, *test.inputs} == set(WORDS)
    assert TASK.split(0.4, seed=1)[0].inputs == dev.inputs != TASK.split(0.4, seed=2)[0].inputs


def test_fewer_prompts_are_the_first_of_more() -> None:
    assert TASK.sample(5, shots=3, seed=4) == TASK.sample(20, shots=3, seed=4)[:5]
    assert TASK.sample(5, shots=3, seed=4) != TASK.sample(5, shots=3, seed=5)


def test_sampling_is_the_same_in_every_process() -> None:
    code = (
        "from tv_lens import Task; t = Task('t', tuple('abcdefghij'), str.upper); p = t.sample(4, shots=3, seed=7);"
        "print([q.text for q in p], t.substitutes(p, 2, seed=7), t.split(0.5, seed=7)[0].inputs)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TASK.sample(31, shots=1, seed=0), "31 prompts need 31 different queries and there are 30"),
        (lambda: TASK.sample(1, shots=30, seed=0), "30 shots and a query need 31 different inputs and there are 30"),
        (lambda: TASK.sample(0, shots=1, seed=0), "cannot sample 0 prompts"),
        (
            lambda: TASK.substitutes(TASK.sample(2, shots=28, seed=0), 2, seed=0),
            "prompt 0: 2 substitutes are asked for and 1 of the 30 inputs",
        ),
        (lambda: TASK.substitutes([], 0, seed=0), "0 substitutes"),
        (lambda: TASK.split(0.01, seed=0), "0.01 of 30 inputs leaves 0 and 30"),
        (lambda: Task("t", ("a", "b", "a"), str.upper), "1 duplicate inputs .'a'."),
    ],
)
def test_too_few_inputs_says_how_many(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def test_numbers_in_a_mapping_are_refused(as_users_run_it: None) -> None:
    with pytest.raises(ValueError, match="'two' -> 2 is not a pair of texts"):
        Task.from_mapping("count", {"two": 2})  # type: ignore[dict-item]


def test_a_mapping_is_copied() -> None:
    table = {"hot": "cold", "big": "small"}
    task = Task.from_mapping("antonyms", table)
    table["hot"] = "wrong"
    assert task.answer("hot") == "cold"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.json", '{"hot": "cold", "größe": "a, \\"b\\"\\n{c}"}'),
        ("t.json", '\ufeff[["hot", "cold"], ["größe", "a, \\"b\\"\\n{c}"]]'),
        ("t.csv", 'hot,cold\r\ngröße,"a, ""b""\n{c}"\r\n'),
        ("T.CSV", '\ufeffInput,Output\nhot,cold\n\ngröße,"a, ""b""\n{c}"'),
    ],
)
def test_files_hold_what_was_written(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    task = Task.from_file(tmp_path / name)
    assert task.name == name.split(".")[0]
    assert {text: task.answer(text) for text in task.inputs} == {"hot": "cold", "größe": 'a, "b"\n{c}'}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"hot cold", r"t.txt: a task is read from .json or .csv"),
        ("t.json", b'{"hot": "cold"', r"t.json: .*delimiter"),
        ("t.json", b'"hot"', r"t.json: holds a str; expected an object"),
        ("t.json", b'{"hot": "cold", "hot": "warm"}', r"t.json, key 2: duplicate input 'hot'"),
        ("t.json", b'{"two": 2}', r"t.json, key 1: .'two', 2. is not a pair of non-empty texts"),
        ("t.json", b'[["a", "b"], ["c"]]', r"t.json, pair 2: .'c'. is not a pair"),
        ("t.json", b"[" * 100_000, r"t.json: nested too deeply"),
        ("t.json", b"{}", r"t.json: no pairs"),
        ("t.csv", b"", r"t.csv: no pairs"),
        ("t.csv", b"a,b\nc,d,e\n", r"t.csv, line 2: .'c', 'd', 'e'. is not a pair"),
        ("t.csv", b"a,b\nc,\n", r"t.csv, line 2: .'c', ''. is not a pair"),
        ("t.csv", b'a,b\n"c,d\n', r"t.csv: line 2: unexpected end of data"),
        ("t.csv", "größe,b\n".encode("latin-1"), r"t.csv: not UTF-8"),
    ],
)
def test_a_bad_file_says_where_and_what(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Task.from_file(tmp_path / name)


def test_a_file_of_many_rows_reads_like_the_mapping(tmp_path: Path) -> None:
    table = {f"word {i}": f"out {i}" for i in range(5000)}
    (tmp_path / "many.json").write_text(json.dumps(table))
    assert Task.from_file(tmp_path / "many.json").inputs == tuple(table)


@pytest.mark.parametrize(
    ("rule", "prediction", "answer", "right"),
    [
        (exact_match, " cold ", "cold", True),
        (exact_match, "COLD", "cold", False),
        (exact_match, "cold and", "cold", False),
        (starts_with, "cold and wet", "cold", True),
        (starts_with, "New", "New York", True),
        (starts_with, "N", "New York", False),
        (starts_with, "T", "Taipei", False),
        (starts_with, "", "Taipei", False),
        (starts_with, "", "", True),
        (starts_with, "the cold", "cold", False),
        (starts_with, "colder", "cold", False),
        (starts_with, "30", "3", False),
        (starts_with, "3.", "3", True),
        (starts_with, "running_fast()", "running", True),
        (starts_with, "冷的", "冷", True),
    ],
)
def test_what_counts_as_right(rule, prediction: str, answer: str, right: bool) -> None:  # type: ignore[no-untyped-def]
    assert rule(prediction, answer) is right


def test_a_first_token_is_whole_and_in_its_place() -> None:
    """By hand: the tiny tokenizer knows " cold" as one token, and "->zebra" ends in z, e, br, a."""
    bridge = make_twins("llama").bridge
    assert bridge.tokenizer.tokenize("x -> cold")[-1] == "Ġcold"
    assert bridge.tokenizer.tokenize("x->zebra")[-4:] == ["z", "e", "br", "a"]
    spaced, tight = first_token(bridge, Template()), first_token(bridge, Template("{input}->{output}"))
    assert spaced(" cold", "cold")
    assert spaced("zebra crossing", "zebra")
    assert tight("z", "zebra")
    for rule, wrong, answer in (
        (spaced, "c", "cold"),
        (spaced, "", "zebra"),
        (tight, "ze", "zebra"),
        (tight, "e", "zebra"),
    ):
        assert not rule(wrong, answer)


def test_a_first_token_that_is_only_part_of_a_character_is_not_accepted() -> None:
    """The tiny tokenizer writes 北 and 東 as three byte tokens each, which all read as U+FFFD."""
    rule = first_token(make_twins("llama").bridge, Template("{input}->{output}"))
    assert not rule("\ufffd", "東京")
    assert rule("東京", "東京")
    assert not rule("x", "")


def test_the_template_goes_into_the_prompts() -> None:
    template = Template("Q: {input} A: {output}", " | ")
    [prompt] = TASK.sample(1, shots=1, seed=0, template=template)
    assert prompt.text.startswith("Q: w")
    assert " | Q: w" in prompt.text
