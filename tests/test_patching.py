"""The keywords of the patching functions, against plain Hugging Face hooks: how, where in the prompt, which layers,
with or without the demonstrations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Twins, ids_of, make_tokenizer, make_twins, original
from oracle import count_positions, refuse, until_end
from oracle_edits import PlainEdit, hooked_run
from torch import Tensor

import tv_lens as tv
from tv_lens import Example, Prompt, TaskVectors, Template
from tv_lens.engines import Capability

NEVER = Template("{input} -> {output}", separator="\n\n\n\n")
SHOTS = (Example("hot", "cold"), Example("the quick", "brown fox"))
PROMPTS = [
    Prompt(SHOTS[: i % 3], query, template=NEVER, answer="cold") for i, query in enumerate(("big cat", "a b", "x y z"))
]


def vectors_for(twins: Twins, n: int = 3, **changes: object) -> TaskVectors:
    values = torch.randn(n, 4, 32, generator=torch.Generator().manual_seed(3)) * 2
    return TaskVectors(values, twins.bridge.cfg.model_name, "t", **changes)  # type: ignore[arg-type]


def plain_logits(twins: Twins, text: str, edits: Sequence[tuple[int, int, Tensor, str]]) -> Tensor:
    """Next-token logits under plain hooks; an edit is layer, position from the end, vector, op."""
    ids = ids_of(twins.bridge, text)
    plain = [PlainEdit("resid_post", layer, ids.shape[1] + at, vector, op) for layer, at, vector, op in edits]
    return hooked_run(twins, ids, plain)[1][-1]


# Overwrite and add


def test_added_vectors_are_plain_hooks_that_add(twins: Twins) -> None:
    vectors = vectors_for(twins)
    actual = tv.patched_logits(twins.bridge, PROMPTS, vectors, 2, how=tv.add(0.5))
    for i, prompt in enumerate(PROMPTS):
        wanted = plain_logits(twins, prompt.zero_shot().text, [(2, -1, 0.5 * vectors.values[i, 2], "add")])
        torch.testing.assert_close(actual[i], wanted, atol=1e-4, rtol=1e-4)


def test_vectors_are_written_the_way_they_are_meant(gpt2: Twins) -> None:
    set_, added = vectors_for(gpt2), vectors_for(gpt2, op="add")
    for vectors, how in ((set_, tv.overwrite), (added, tv.add())):
        by_default = tv.patched_logits(gpt2.bridge, PROMPTS, vectors, 1)
        assert torch.equal(by_default, tv.patched_logits(gpt2.bridge, PROMPTS, vectors, 1, how=how))
    assert not torch.equal(
        tv.patched_logits(gpt2.bridge, PROMPTS, set_, 1), tv.patched_logits(gpt2.bridge, PROMPTS, added, 1)
    )


def test_several_layers_at_once(twins: Twins) -> None:
    vectors = vectors_for(twins)
    actual = tv.patched_logits(twins.bridge, PROMPTS, vectors, tv.layers(0, 2, 3), how=tv.add())
    for i, prompt in enumerate(PROMPTS):
        edits = [(layer, -1, vectors.values[i, layer], "add") for layer in (0, 2, 3)]
        wanted = plain_logits(twins, prompt.zero_shot().text, edits)
        torch.testing.assert_close(actual[i], wanted, atol=1e-4, rtol=1e-4)


# Positions


def tokens(bridge_tokens: list[str]) -> list[str]:
    return [token.replace("Ġ", " ").replace("Ċ", "\n") for token in bridge_tokens]


@pytest.mark.parametrize("bos", [True, False])
def test_roles_by_hand(bos: bool) -> None:
    """The role of each token of a prompt, in a known tokenizer."""
    bridge = make_twins("llama", make_tokenizer(bos=bos)).bridge
    prompt = Prompt((Example("hot", "cold"), Example("big", "small")), "tall", template=Template())
    text = prompt.text
    split = tokens(bridge.tokenizer.tokenize(text, add_special_tokens=False))
    assert "".join(split) == text
    table = tv.show_tokens(bridge, prompt)
    by_role = {
        role: "".join(t for t, r in zip(table.tokens, table.roles, strict=True) if r == role) for role in table.roles
    }
    assert by_role["input"] == "hotbig"
    assert by_role["output"] == " cold small"  # a token belongs to the role in which it ends
    assert by_role["separator"] == " ->" * 3
    assert by_role["boundary"] == "\n\n"
    assert by_role["query"] == "tall"
    assert table.roles[:2] == ("bos", "input")
    # A tokenizer without a BOS uses its end-of-text token; users should know.
    assert table.tokens[0] == ("<s>" if bos else "</s>")
    assert table.bos.startswith(f"{table.tokens[0]!r} is put in front, as the model's configuration")
    assert ("it is also the end-of-text token" in table.bos) == (not bos)
    assert list(table.positions) == list(range(-len(table.ids), 0))
    assert list(table.ids) == ids_of(bridge, text)[0].tolist()
    assert table.edited == (False,) * (len(table.ids) - 1) + (True,)


def test_positions_by_hand() -> None:
    bridge = make_twins("llama").bridge
    engine = tv.LocalEngine(bridge)
    prompt = Prompt((Example("hot", "cold"), Example("big", "small")), "tall", template=Template())
    [ids] = engine.text.encode([prompt.text])
    roles = engine.text.roles(prompt, ids)
    places = {
        name: engine.text.positions(prompt, ids, name, 0) for name in ("last", "separators", "outputs", "query", "all")
    }
    assert places["last"] == [-1]
    assert places["all"] == list(range(-len(ids), 0))
    arrows = [i - len(ids) for i, token in enumerate(ids) if engine.text.decode([token]) == " ->"]
    assert places["separators"] == arrows
    assert len(arrows) == 3
    assert arrows[-1] == -1
    assert engine.text.decode([ids[position] for position in places["outputs"]]) == " cold small"
    assert engine.text.decode([ids[position] for position in places["query"]]) == "tall"
    assert engine.text.positions(prompt, ids, [-3, -1], 0) == [-3, -1]
    assert len(roles) == len(ids)


@pytest.mark.parametrize("positions", ["last", "separators", "outputs", "query", "all", [-2], [-1, -3]])
@pytest.mark.parametrize("keep", [True, False])
def test_every_kind_of_position_is_plain_hooks_there(twins: Twins, positions: object, keep: bool) -> None:
    """In batches of rows of unequal length, with a different number of positions in each."""
    if positions == "outputs" and not keep:
        return  # a query alone has no such positions; refused below
    prompts = [replace(prompt, examples=SHOTS[: 1 + i % 2]) for i, prompt in enumerate(PROMPTS)]
    vectors = vectors_for(twins)
    actual = tv.patched_logits(
        twins.bridge,
        prompts,
        vectors,
        1,
        how=tv.add(),
        positions=positions,  # type: ignore[arg-type]
        keep_demonstrations=keep,
    )
    for i, prompt in enumerate(prompts):
        asked = prompt if keep else prompt.zero_shot()
        table = tv.show_tokens(twins.bridge, prompt, positions=positions, keep_demonstrations=keep)  # type: ignore[arg-type]
        places = [position for position, edited in zip(table.positions, table.edited, strict=True) if edited]
        assert places
        edits = [(1, position, vectors.values[i, 1], "add") for position in places]
        torch.testing.assert_close(actual[i], plain_logits(twins, asked.text, edits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["query", "separators", [-2, -1]])
def test_a_sweep_at_several_positions_is_layer_by_layer(twins: Twins, positions: object) -> None:
    """Prefixes are shared only up to the first of the positions."""
    whole_answers = tv.Rule("whole answers", tv.starts_with)
    task = tv.Task("upper", ("a b", "bb c", "cold d", "dog e", "quick brown"), str.upper, whole_answers)
    prompts = task.sample(4, shots=2, seed=0, template=NEVER)
    vectors = vectors_for(twins, 4)
    keywords: dict[str, Any] = {"how": tv.add(2.0), "positions": positions, "max_new_tokens": 3}
    keywords["keep_demonstrations"] = True
    sweep = tv.sweep_layers(twins.bridge, task, prompts, vectors, **keywords)
    for layer in range(4):
        alone = tv.patch_generate(twins.bridge, prompts, vectors, layer, **keywords)
        assert sweep.at(layer).texts == alone.texts
    for i, prompt in enumerate(prompts):
        table = tv.show_tokens(twins.bridge, prompt, positions=positions)  # type: ignore[arg-type]
        places = [position for position, edited in zip(table.positions, table.edited, strict=True) if edited]
        edits = [(2, position, 2 * vectors.values[i, 2], "add") for position in places]
        first = plain_logits(twins, prompt.text, edits).argmax()
        again = tv.patch_generate(twins.bridge, prompts, vectors, 2, **{**keywords, "max_new_tokens": 1})
        assert again.tokens[i, 0] == first


def test_an_edit_before_the_last_token_still_shares_the_prefix_before_it() -> None:
    """4 layers in one batch: the query once up to the first edit, then the rest for each layer."""
    bridge = make_twins("llama").bridge
    task = tv.Task("t", ("a", "b", "x"), str.upper)
    prompts = task.sample(3, shots=1, seed=0, template=Template())
    length = ids_of(bridge, prompts[0].text).shape[1]
    vectors = TaskVectors(torch.ones(1, 4, 32), "tiny-llama", "t")
    for positions, reach in (("last", 1), ([-3], 3)):
        run = count_positions(
            bridge,
            lambda p=positions: tv.sweep_layers(  # type: ignore[misc]
                bridge, task, prompts, vectors, positions=p, keep_demonstrations=True, max_new_tokens=1
            ),
        )
        assert run == 3 * (length - reach + 4 * reach)


def test_every_step_continues_at_the_last_of_several_positions(gpt2: Twins) -> None:
    """Steering all of a prompt and everything after it: the vector once per position."""
    vector = torch.randn(32, generator=torch.Generator().manual_seed(8))
    vectors = TaskVectors(vector.expand(1, 4, -1), "tiny-gpt2", "t")
    texts = ["hot -> cold\nbig ->", "a b"]
    how = tv.add(1.5, every_step=True)
    actual = tv.patch_generate(gpt2.bridge, texts, vectors, 2, how=how, positions="all", max_new_tokens=3).tokens
    for row, text in enumerate(texts):
        ids = ids_of(gpt2.bridge, text)
        chosen: list[int] = []
        for _ in range(3):
            edits = [PlainEdit("resid_post", 2, position, 1.5 * vector, "add") for position in range(ids.shape[1])]
            chosen.append(int(hooked_run(gpt2, ids, edits)[1][-1].argmax()))
            ids = torch.cat([ids, torch.tensor([chosen[-1:]])], dim=1)
        assert until_end(actual[row]) == until_end(torch.tensor(chosen))


# Evaluation, conflict and plain strings


def test_an_evaluation_takes_the_same_keywords(twins: Twins) -> None:
    task = tv.Task("upper", ("a b", "bb c", "cold d", "dog e", "quick brown", "x"), str.upper)
    prompts = task.sample(3, shots=2, seed=0, template=NEVER)
    vectors = vectors_for(twins, op="add", options={"substitutes": 1})
    keywords: dict[str, Any] = {
        "how": tv.add(3.0),
        "positions": "separators",
        "keep_demonstrations": True,
        "max_new_tokens": 2,
    }
    actual = tv.evaluate(twins.bridge, task, prompts, vectors, tv.layers(1, 3), **keywords)
    alone = tv.patch_generate(twins.bridge, prompts, vectors, tv.layers(1, 3), **keywords)
    assert actual.patched.texts == alone.texts
    assert actual.layer == (1, 3)
    assert actual.to_pandas()["layer"].tolist()[2] == (1, 3)
    assert actual.plot().layout.title.text.endswith("patched at layers 1, 3")
    keywords.pop("keep_demonstrations")
    clash = tv.conflict(twins.bridge, task, task, prompts, vectors, tv.layers(1, 3), **keywords)
    assert clash.patched_task.texts == alone.texts


def test_plain_strings_are_prompts(twins: Twins) -> None:
    """Their continuation is returned as it is, up to the end of text."""
    texts = ["the quick brown", "hot -> cold\nbig ->"]
    vectors = vectors_for(twins, 2)
    actual = tv.generate(twins.bridge, texts, max_new_tokens=5)
    patched = tv.patch_generate(twins.bridge, texts, vectors, 1, max_new_tokens=5)
    logits = tv.patched_logits(twins.bridge, texts, vectors, 1)
    for i, text in enumerate(texts):
        kept = until_end(actual.tokens[i])
        assert actual[i] == twins.bridge.tokenizer.decode(kept, skip_special_tokens=True)
        wanted = plain_logits(twins, text, [(1, -1, vectors.values[i, 1], "set")])
        torch.testing.assert_close(logits[i], wanted, atol=1e-4, rtol=1e-4)
        assert patched.tokens[i, 0] == wanted.argmax()
    assert tv.show_tokens(twins.bridge, texts[0]).roles[-1] == "query"


# Reading


@pytest.mark.parametrize("positions", ["last", "separators", "outputs", [-1, -2]])
@pytest.mark.parametrize("site", [tv.RESID_POST, tv.ATTN_OUT, tv.MLP_OUT, tv.HEADS], ids=str)
def test_extraction_at_any_site_and_position_is_the_mean_of_plain_hooks(
    site: tv.Site, positions: object, twins: Twins
) -> None:
    task = tv.Task("upper", ("a", "bb", "cold", "dog", "quick brown", "fox", "wet", "x"), str.upper)
    prompts = task.sample(3, shots=2, seed=0, template=Template())
    substitutes = task.substitutes(prompts, 2, seed=0)
    actual = tv.extract(twins.bridge, prompts, substitutes, site=site, positions=positions)  # type: ignore[arg-type]
    assert (actual.site, actual.layers, actual.width) == (site, (0, 1, 2, 3), 32)
    for i, (prompt, queries) in enumerate(zip(prompts, substitutes, strict=True)):
        reads = []
        for query in queries:
            asked = prompt.asking(query)
            table = tv.show_tokens(twins.bridge, asked, positions=positions)  # type: ignore[arg-type]
            places = [position for position, edited in zip(table.positions, table.edited, strict=True) if edited]
            seen, _ = hooked_run(twins, ids_of(twins.bridge, asked.text))
            reads.append(torch.stack([seen[site.name, layer][0, places].mean(dim=0) for layer in range(4)]))
        torch.testing.assert_close(actual.values[i], torch.stack(reads).mean(dim=0), atol=1e-4, rtol=1e-4)


def test_vectors_of_a_site_are_written_there(twins: Twins) -> None:
    values = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(6))
    for site in (tv.ATTN_OUT, tv.MLP_OUT, tv.HEADS):
        vectors = TaskVectors(values, twins.bridge.cfg.model_name, "t", site=site)
        actual = tv.patched_logits(twins.bridge, PROMPTS, vectors, 2)
        for i, prompt in enumerate(PROMPTS):
            ids = ids_of(twins.bridge, prompt.zero_shot().text)
            edit = PlainEdit(site.name, 2, ids.shape[1] - 1, values[i, 2])
            torch.testing.assert_close(actual[i], hooked_run(twins, ids, [edit])[1][-1], atol=1e-4, rtol=1e-4)


def test_vectors_for_some_layers_only(gpt2: Twins) -> None:
    whole = vectors_for(gpt2)
    some = replace(whole, values=whole.values[:, [1, 3]], layers=(1, 3), n_layers=4)
    assert torch.equal(some.at(3), whole.at(3))
    task = tv.Task("upper", ("a", "bb", "cold", "dog"), str.upper)
    sweep = tv.sweep_layers(gpt2.bridge, task, PROMPTS, some, max_new_tokens=1)
    assert sweep.layers == (1, 3)
    for layer in sweep.layers:
        assert torch.equal(
            tv.patched_logits(gpt2.bridge, PROMPTS, some, layer), tv.patched_logits(gpt2.bridge, PROMPTS, whole, layer)
        )
    for call in (
        lambda: some.at(2),
        lambda: tv.patched_logits(gpt2.bridge, PROMPTS, some, 2),
        lambda: tv.sweep_layers(gpt2.bridge, task, PROMPTS, some, [2]),
    ):
        with pytest.raises(tv.TvLensError, match=r"has no vector for layer 2, only for \[1, 3\]"):
            call()
    with pytest.raises(tv.TvLensError, match="2 layers of values for the layers"):
        replace(some, layers=(3, 3))


# What is refused, before the model runs


def test_wrong_keywords_say_what_to_do(as_users_run_it: None) -> None:
    twins = make_twins("gpt2")
    bridge, vectors = twins.bridge, vectors_for(twins)
    original(bridge).register_forward_pre_hook(refuse)
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"positions": "outputs"}, "prompt 0 has 0 tokens for positions='outputs'.*keep_demonstrations=True"),
        ({"positions": "first"}, "positions is 'first'; use 'last', 'separators'"),
        ({"positions": [0]}, "negative numbers, which count from the end"),
        ({"positions": [-1, -1]}, "use different negative numbers"),
        ({"positions": []}, "use different negative numbers"),
        ({"positions": [-50]}, "prompt 0 has . tokens, so there is none at position -50"),
    )
    for keywords, message in wrong:
        with pytest.raises(tv.TvLensError, match=message):
            tv.patched_logits(bridge, PROMPTS, vectors, 1, **keywords)
    for make, message in (
        (lambda: tv.add(float("nan")), "strength is nan"),
        (lambda: tv.layers(), "give at least one layer"),
        (lambda: tv.layers(1, 1), "each of them once"),
    ):
        with pytest.raises(tv.TvLensError, match=message):
            make()
    with pytest.raises(tv.TvLensError, match="layer 9 is not one of tiny-gpt2"):
        tv.patched_logits(bridge, PROMPTS, vectors, tv.layers(1, 9))
    with pytest.raises(tv.TvLensError, match="a list of at least one Prompt"):
        tv.generate(bridge, "a text")
    weak = tv.LocalEngine(bridge)
    needed: tuple[tuple[Capability, dict[str, Any]], ...] = (
        (Capability.PATCH, {}),
        (Capability.ADD, {"how": tv.add()}),
        (Capability.KEEP_NORM, {"how": tv.add(keep_norm=True)}),
        (Capability.POSITIONS, {"positions": "query"}),
    )
    for capability, keywords in needed:
        weak.capabilities = frozenset(Capability) - {capability}
        with pytest.raises(tv.UnsupportedError, match=f"tiny-gpt2 cannot {capability.value}; this engine has "):
            tv.patched_logits(weak, PROMPTS, vectors, 1, **keywords)


def test_vectors_of_another_model_are_warned_about(gpt2: Twins) -> None:
    vectors = replace(vectors_for(gpt2), model="gpt2-medium")
    for call in (
        lambda: tv.patched_logits(gpt2.bridge, PROMPTS, vectors, 1),
        lambda: tv.sweep_layers(gpt2.bridge, tv.Task("t", ("a", "b"), str.upper), PROMPTS, vectors, max_new_tokens=1),
    ):
        with pytest.warns(tv.TvLensWarning, match="read from gpt2-medium and are written into tiny-gpt2") as warned:
            call()
        assert len(warned) == 1
        assert not warned[0].filename.startswith(str(Path(tv.__file__).parent))  # at the caller's line
