"""Head effects as values: means, intervals, choices, diagnosis, files; the expected numbers are computed by hand."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import tv_lens as tv
from tv_lens.heads import FewShot

# Three prompts, the layers 1 and 3 of 4, two heads.
VALUES = torch.tensor(
    [
        [[0.1, 0.30], [-0.2, 0.0]],
        [[0.2, 0.31], [-0.2, 0.1]],
        [[0.3, 0.32], [-0.2, -0.1]],
    ]
)


def effects_of(**changes: Any) -> tv.HeadEffects:
    given: dict[str, Any] = {
        "values": VALUES,
        "baseline": torch.tensor([-3.0, -3.0, -3.0]),
        "model": "tiny",
        "task": "pairs",
        "layers": (1, 3),
        "n_layers": 4,
        "prompts": ("p", "q", "r"),
        "answers": ("a", "b", "c"),
        "first_tokens": 3,
        "few_shot": FewShot(n=30, right=27, probability=0.8, majority=1),
        "options": {"corruption": "shuffle_outputs"},
    }
    return tv.HeadEffects(**{**given, **changes})


def t_of_two_degrees(p: float) -> float:
    """The quantile of Student's t with two degrees of freedom, in closed form."""
    return (2 * p - 1) / math.sqrt(2 * p * (1 - p))


def test_means_intervals_and_order() -> None:
    effects = effects_of()
    torch.testing.assert_close(effects.mean(), torch.tensor([[0.2, 0.31], [-0.2, 0.0]]))
    assert effects.heads == ((1, 0), (1, 1), (3, 0), (3, 1))
    assert effects.top(3) == ((1, 1), (1, 0), (3, 1))
    assert str(effects.top(1)[0]) == "L1.H1"
    assert effects.at((1, 0)) == pytest.approx(0.2)
    low, high = effects.interval()
    margin = t_of_two_degrees(0.975) * 0.1 / math.sqrt(3)
    assert (float(low[0, 0]), float(high[0, 0])) == pytest.approx((0.2 - margin, 0.2 + margin), abs=1e-6)
    assert float(low[1, 0]) == float(high[1, 0]) == pytest.approx(-0.2)
    low, _ = effects.interval(simultaneous=True)  # four heads
    assert float(low[0, 1]) == pytest.approx(0.31 - t_of_two_degrees(1 - 0.05 / 8) * 0.01 / math.sqrt(3), abs=1e-6)
    assert effects.significant == ((1, 1),)  # (1, 0) varies too much
    assert effects.diagnosis == ()
    table = effects.to_pandas()
    assert table["layer"].tolist() == [1, 1, 3, 3]
    assert table["head"].tolist() == [1, 0, 1, 0]
    assert table["significant"].tolist() == [True, False, False, False]
    assert "significant" in effects._repr_html_()


def test_heads_of_equal_effect_are_in_the_order_of_layers() -> None:
    effects = effects_of(values=torch.ones(3, 2, 2))
    assert effects.top(4) == ((1, 0), (1, 1), (3, 0), (3, 1))


def test_seeds_are_averaged_before_intervals_are_taken() -> None:
    """Twice the rows, but no more prompts: the same interval."""
    shifted = torch.cat([VALUES + 0.05, VALUES - 0.05])
    effects = effects_of(values=shifted, baseline=torch.zeros(6), seeds=(0, 1))
    assert len(effects) == 3
    torch.testing.assert_close(effects.by_prompt, VALUES)
    for actual, wanted in zip(effects.interval(), effects_of().interval(), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_heads_without_an_effect_are_left_out() -> None:
    values = VALUES.clone()
    values[:, 0, 1] = math.nan
    effects = effects_of(values=values)
    assert effects.heads == ((1, 0), (3, 0), (3, 1))
    assert effects.top(2) == ((1, 0), (3, 1))
    assert len(effects.to_pandas()) == 3
    with pytest.raises(tv.TvLensError, match=r"has no effect of head L1.H1"):
        effects.at((1, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"few_shot": FewShot(30, 11, 0.8, 10)}, "few-shot accuracy .* is 0.37 of 30 prompts, .* answer .0.33."),
        ({"baseline": torch.tensor([-0.3, -0.3, -0.3])}, "permuted outputs hardly hurt: .* 0.741 with them and 0.800"),
        ({"first_tokens": 1}, "all answers begin with the same token"),
        ({"values": VALUES - 0.5}, "no head's effect is above 0 by the simultaneous 95% interval of 4 heads over 3"),
        ({"values": VALUES[:1], "baseline": torch.tensor([-3.0])}, "one prompt gives no interval"),
    ],
)
def test_the_diagnosis_says_what_is_wrong_and_what_to_try(changes: dict[str, Any], message: str) -> None:
    [text] = effects_of(**changes).diagnosis
    assert re.search(message, text)
    assert "; try" in text or "use 20" in text
    assert "Note: " in effects_of(**changes)._repr_html_()


def test_effects_come_back_from_their_file(tmp_path: Path) -> None:
    values = VALUES.clone()
    values[:, 0, 1] = math.nan
    for effects in (effects_of(), effects_of(values=values, measure="log-probability", few_shot=None)):
        path = tmp_path / "e.safetensors"
        effects.save(path)
        again = tv.HeadEffects.load(path)
        assert torch.equal(again.values.view(torch.int32), effects.values.view(torch.int32))
        assert torch.equal(again.baseline, effects.baseline)
        names = set(vars(effects)) - {"values", "baseline"}
        assert {name: getattr(again, name) for name in names} == {name: getattr(effects, name) for name in names}
        effects.save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_damaged_files_and_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    effects_of().save(path)
    content = path.read_bytes()
    for damaged, message in (
        (content[:-1] + bytes([content[-1] ^ 1]), "does not match its checksum"),
        (content[:40], "not a file of head effects"),
        (content.replace(b'"task":', b'"tusk":').replace(b'"task\\":', b'"tusk\\":'), "not a file of head effects"),
        (content.replace(b'pairs', b'parts'), "does not match its checksum"),
        (content.replace(b'format\\": 1', b'format\\": 9'), "by a newer tv_lens"),
        (b"text", "not a file of head effects"),
        (safetensors.torch.save({"values": torch.ones(1)}), "it has no head effects"),
    ):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises(tv.TvLensError, match=message):
            tv.HeadEffects.load(path)
    with pytest.raises(OSError, match="missing"):
        tv.HeadEffects.load(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": VALUES[:, :1]}, "do not fit together"),
        ({"baseline": torch.zeros(2)}, "do not fit together"),
        ({"seeds": (0, 1)}, "do not fit together"),
        ({"layers": (1, 4)}, "not those of a model with 4 layers"),
        ({"values": VALUES / 0}, "effects are infinite"),
        ({"measure": "logit"}, "measure 'logit'"),
        ({"how": "guess"}, "how 'guess'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, as_users_run_it: None) -> None:
    with pytest.raises(tv.TvLensError, match=message):
        effects_of(**changes)


def test_effects_of_several_tasks_are_averaged() -> None:
    other = effects_of(values=VALUES + 0.2, task="others")
    both = tv.across_tasks([effects_of(), other])
    assert (len(both), both.task) == (2, "pairs + others")
    torch.testing.assert_close(both.mean(), effects_of().mean() + 0.1)
    torch.testing.assert_close(both.values[1], other.mean())
    with pytest.raises(tv.TvLensError, match="cannot be averaged"):
        tv.across_tasks([effects_of(), effects_of(measure="log-probability")])
    with pytest.raises(tv.TvLensError, match="no effects to average"):
        tv.across_tasks([])


def test_published_lists_are_read(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    for content in (
        {"top_heads": [[15, 2], [12, 15]], "top_head_effects": [0.05, 0.04]},
        [[15, 2, 0.05], [12, 15, 0.04]],
        [[15, 2], [12, 15]],
    ):
        path.write_text(json.dumps(content))
        assert tv.published_heads(path) == (tv.Head(15, 2), tv.Head(12, 15))
    broken: Any
    for broken in ({"heads": []}, [], [[1]], [[1.5, 2]], [["a", "b"]], {"top_heads": {"1": 2}}, "text"):
        path.write_text(json.dumps(broken))
        with pytest.raises(tv.TvLensError, match="heads.json: not a list of heads such as"):
            tv.published_heads(path)


def test_the_heat_map_has_each_head_in_its_cell() -> None:
    figure = effects_of().plot(mark=2)
    [heat] = figure.data
    assert (heat.x, heat.y) == ((0, 1), (1, 3))
    assert [value for row in heat.z for value in row] == pytest.approx([0.2, 0.31, -0.2, 0.0], abs=1e-6)
    assert [text for row in heat.text for text in row] == ["2", "1", "-", ""]  # the same on every prompt
    [heat] = effects_of(values=VALUES + 0.5).plot(mark=1).data
    assert [text for row in heat.text for text in row] == ["+", "1", "+", ""]
    [heat] = effects_of().plot(mark=2).data
    assert heat.zmax == -heat.zmin == pytest.approx(0.31)
    assert "0.3100" in heat.customdata[0][1]
    values = VALUES.clone()
    values[:, 1, 0] = math.nan
    [heat] = effects_of(values=values).plot().data
    assert heat.z[1][0] is None or math.isnan(heat.z[1][0])
    noted = effects_of(values=VALUES - 0.5).plot()
    assert "Note: no head" in noted.layout.annotations[0].text


def test_vectors_of_some_heads_come_back_from_their_file(tmp_path: Path) -> None:
    values = torch.arange(8.0).reshape(1, 2, 4)
    vectors = tv.TaskVectors(
        values, "tiny", "t", site=tv.HEADS, layers=(1, 3), n_layers=4, n_heads=2, heads=(tv.Head(3, 1), tv.Head(1, 0))
    )
    assert vectors.written.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert vectors.by_head[0, 1].tolist() == [[4, 5], [6, 7]]
    vectors.save(tmp_path / "v.safetensors")
    again = tv.TaskVectors.load(tmp_path / "v.safetensors")
    assert (again.heads, again.n_heads, again.site, again.layers) == (vectors.heads, 2, tv.HEADS, (1, 3))
    assert (2 * again).heads == again.mean().heads == vectors.heads
    with pytest.raises(tv.TvLensError, match=r"heads L3.H1, L1.H0 and of all do not go together"):
        vectors + tv.TaskVectors(values, "tiny", "t", site=tv.HEADS, layers=(1, 3), n_layers=4, n_heads=2)
    for head, message in (((2, 0), "head 0 of layer 2 is not one"), ((1, 2), "2 heads, 0 to 1")):
        with pytest.raises(tv.TvLensError, match=message):
            tv.TaskVectors(values, "tiny", "t", layers=(1, 3), n_layers=4, n_heads=2, heads=(tv.Head(*head),))
    with pytest.raises(tv.TvLensError, match="holds no outputs of heads"):
        tv.TaskVectors(values, "tiny", "t").by_head.sum()
