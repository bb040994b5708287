"""The laws of edits, against plain Hugging Face hooks: every site, several layers, positions and heads, set and add,
once and at every step, in batches of rows of unequal length.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, CONFIGS, Twins, ids_of, make_twins, original
from oracle_edits import PlainEdit, has_site, hooked_run
from passes import logits_of, read_texts, tokens_of
from torch import Tensor

import tv_lens as tv
from tv_lens.edits import ATTN_OUT, HEADS, MLP_OUT, RESID_POST, SITES, Edit, Edits, Site
from tv_lens.engines import Replay

TEXTS = ("hot -> cold\nbig ->", "a b c d", "the quick brown fox", "x y z wet")
BROKEN = ("falcon alibi", "falcon 40b")  # TransformerLens does not run them as Hugging Face does
NAMES = [name for name in CONFIGS if name not in BROKEN]


@cache
def twins_of(name: str) -> Twins:
    return make_twins(name)


def engine_of(name: str) -> tv.LocalEngine:
    return tv.LocalEngine(twins_of(name).bridge, progress=False)


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def sites_of(name: str, engine: tv.Engine) -> list[Site]:
    """The sites that both the engine and the oracle have in some layer."""
    twins = twins_of(name)
    return [
        site
        for site in SITES.values()
        if site in engine.sites and all(has_site(twins, site.name, layer) for layer in engine.layers_of(site))
    ]


def expected(name: str, edits: Edits, row: int, n_heads: int) -> Tensor:
    """Next-token logits of one text under plain hooks."""
    twins = twins_of(name)
    ids = ids_of(twins.bridge, TEXTS[row])
    own = [
        PlainEdit(
            edit.site.name,
            edit.layer,
            ids.shape[1] + edit.position,
            edit.value[edit.rows.tolist().index(row)],
            edit.op,
            edit.head,
            edit.keep_norm,
        )
        for edit in edits
        if row in edit.rows.tolist()
    ]
    return hooked_run(twins, ids, own, n_heads)[1][-1]


def check(name: str, edits: Edits) -> None:
    """Batched rows of unequal length equal each text alone under plain hooks, and the edits have an effect."""
    engine = engine_of(name)
    actual, without = logits_of(engine, TEXTS, edits), logits_of(engine, TEXTS)
    for row in range(len(TEXTS)):
        wanted = expected(name, edits, row, max(1, engine.info.n_heads))
        torch.testing.assert_close(actual[row], wanted, atol=1e-4, rtol=1e-4)
        if any(row in edit.rows.tolist() for edit in edits):
            assert (actual[row] - without[row]).abs().max() > 1e-3


def everywhere(engine: tv.Engine, site: Site, op: str, position: int = -1, seed: int = 1) -> list[Edit]:
    """An edit in each layer that has the site."""
    rows = torch.arange(len(TEXTS))
    width = engine.info.width(site)
    return [
        Edit(noise(len(TEXTS), width, seed=seed + layer), rows, layer, site=site, position=position, op=op)  # type: ignore[arg-type]
        for layer in engine.layers_of(site)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_site_is_read_where_plain_hooks_read_it(name: str) -> None:
    engine, twins = engine_of(name), twins_of(name)
    sites = sites_of(name, engine)
    assert RESID_POST in sites
    for site in sites:
        actual = read_texts(engine, TEXTS, site)
        assert actual.shape == (len(TEXTS), len(engine.layers_of(site)), engine.info.width(site))
        for row, text in enumerate(TEXTS):
            seen, _ = hooked_run(twins, ids_of(twins.bridge, text))
            for slot, layer in enumerate(engine.layers_of(site)):
                wanted = seen[site.name, layer][0, -1]
                torch.testing.assert_close(actual[row, slot], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("op", ["set", "add"])
@pytest.mark.parametrize("name", NAMES)
def test_every_site_is_written_where_plain_hooks_write_it(name: str, op: str) -> None:
    engine = engine_of(name)
    for site in sites_of(name, engine):
        for edit in everywhere(engine, site, op):
            check(name, Edits([edit]))


@pytest.mark.parametrize("name", NAMES)
def test_several_layers_positions_and_sites_at_once(name: str) -> None:
    """Different positions in different rows, several layers in one pass, set and add together."""
    engine = engine_of(name)
    edits = []
    for i, site in enumerate(sites_of(name, engine)):
        layers, width = engine.layers_of(site), engine.info.width(site)
        edits += [
            Edit(noise(2, width, seed=10 + i), torch.tensor([0, 2]), layers[0], site=site, position=-3, op="set"),
            Edit(noise(3, width, seed=20 + i), torch.tensor([3, 1, 0]), layers[-1], site=site, position=-2, op="add"),
            Edit(noise(4, width, seed=30 + i), torch.arange(4), layers[-1], site=site, position=-1, op="add"),
        ]
    check(name, Edits(edits))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("mamba", "mamba2", "rwkv")])
def test_one_head_is_written_and_no_other(name: str) -> None:
    engine = engine_of(name)
    rows, d_head = torch.tensor([1, 3]), engine.info.d_head
    layer = engine.layers_of(HEADS)[-1]
    check(name, Edits([Edit(noise(2, d_head), rows, layer, site=HEADS, head=2)]))
    several = [Edit(noise(2, d_head, seed=h), rows, layer, site=HEADS, head=h, op="add") for h in (0, 3)]
    check(name, Edits(several))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adding_is_setting_the_sum_with_what_was_read(name: str) -> None:
    engine = engine_of(name)
    rows = torch.arange(len(TEXTS))
    for site in sites_of(name, engine):
        read = read_texts(engine, TEXTS, site)
        for slot, layer in enumerate(engine.layers_of(site)):
            vector = noise(len(TEXTS), engine.info.width(site))
            added = logits_of(engine, TEXTS, Edits([Edit(vector, rows, layer, site=site, op="add")]))
            written = logits_of(engine, TEXTS, Edits([Edit(read[:, slot] + vector, rows, layer, site=site)]))
            torch.testing.assert_close(added, written, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_writing_back_any_set_of_sites_changes_nothing(name: str) -> None:
    engine = engine_of(name)
    rows = torch.arange(len(TEXTS))
    draw = random.Random(name)
    cells = [(site, slot) for site in sites_of(name, engine) for slot in range(len(engine.layers_of(site)))]
    plain = logits_of(engine, TEXTS)
    for _ in range(3):
        chosen = draw.sample(cells, draw.randint(1, len(cells)))
        edits = [
            Edit(read_texts(engine, TEXTS, site)[:, slot], rows, engine.layers_of(site)[slot], site=site)
            for site, slot in chosen
        ]
        torch.testing.assert_close(logits_of(engine, TEXTS, Edits(edits)), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_keep_norm_gives_the_sum_its_old_length(name: str) -> None:
    engine = engine_of(name)
    rows = torch.arange(len(TEXTS))
    edits = Edits(
        Edit(noise(len(TEXTS), 32, seed=layer), rows, layer, op="add", keep_norm=True, position=-1 - layer)
        for layer in (0, 2)
    )
    check(name, edits)
    plain = read_texts(engine, TEXTS)[:, 2].norm(dim=-1)
    one = Edits([Edit(noise(len(TEXTS), 32), rows, 2, op="add", keep_norm=True)])
    made = engine.forward(tokens_of(engine, TEXTS), edits=one, read=[RESID_POST], logits=False)
    torch.testing.assert_close(made.reads[RESID_POST][:, 2].norm(dim=-1), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "mamba", "rwkv", "qwen3_next", "lfm2"])
def test_every_step_writes_at_each_generated_token(name: str) -> None:
    """With a cache and without: the whole text again under plain hooks, with the vector at every position so far."""
    engine, twins = engine_of(name), twins_of(name)
    vector = noise(1, 32, seed=4)[0]
    vectors = tv.TaskVectors(vector.expand(1, engine.n_layers, -1), engine.name, "t")
    how = tv.add(0.7, every_step=True)
    actual = tv.patch_generate(engine, list(TEXTS), vectors, 1, how=how, max_new_tokens=4).tokens
    once = tv.patch_generate(engine, list(TEXTS), vectors, 1, how=tv.add(0.7), max_new_tokens=4).tokens
    for row, text in enumerate(TEXTS):
        ids = ids_of(twins.bridge, text)
        start, chosen = ids.shape[1] - 1, []
        for _ in range(4):
            edits = [PlainEdit("resid_post", 1, slot, 0.7 * vector, "add") for slot in range(start, ids.shape[1])]
            chosen.append(int(hooked_run(twins, ids, edits)[1][-1].argmax()))
            ids = torch.cat([ids, torch.tensor([chosen[-1:]])], dim=1)
        ended = chosen.index(1) + 1 if 1 in chosen else 4
        assert actual[row, :ended].tolist() == chosen[:ended]
    assert not torch.equal(actual, once)  # otherwise the test would show nothing


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_a_replayed_past_is_a_cached_one(name: str) -> None:
    """The same steps with a cache and with whole rows: edits at earlier positions, and another edit in a later step."""
    engine = engine_of(name)
    tokens = tokens_of(engine, TEXTS)
    rows, chosen = torch.arange(len(TEXTS)), torch.tensor([5, 6, 7, 8])
    first = Edits([Edit(noise(4, 32), rows, 0, position=-2), Edit(noise(4, 32, seed=2), rows, 2, op="add")])
    then = Edits([Edit(noise(4, 32, seed=3), rows, 1, op="add")])
    actual = []
    for start in (None, Replay.start(tokens)):
        past = engine.forward(tokens, edits=first, past=start).past
        past = engine.forward(tokens.then(chosen), edits=then, past=past).past
        actual.append(engine.forward(tokens.then(chosen).then(chosen), past=past).logits)
    torch.testing.assert_close(actual[0], actual[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "deepseek_v3", "mistral"])
def test_gradients_are_those_of_plain_hugging_face(name: str) -> None:
    """For a loss on the logits, with respect to vectors at several sites, layers and positions of padded rows."""
    engine, twins = engine_of(name), twins_of(name)
    tokens = tokens_of(engine, TEXTS)
    rows = torch.arange(len(TEXTS))
    target = torch.tensor([3, 4, 5, 6])
    parts = [(RESID_POST, 0, -1, "add"), (RESID_POST, 1, -2, "set"), (HEADS, 2, -1, "add"), (ATTN_OUT, 1, -1, "set")]
    values = [noise(4, engine.info.width(site), seed=i).requires_grad_() for i, (site, *_) in enumerate(parts)]
    edits = Edits(
        Edit(value, rows, layer, site=site, position=position, op=op)  # type: ignore[arg-type]
        for value, (site, layer, position, op) in zip(values, parts, strict=True)
    )
    frozen = {name: p.requires_grad for name, p in original(twins.bridge).named_parameters()}
    logits = engine.forward(tokens, edits=edits, grad=True).logits
    assert logits is not None
    actual = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, target, reduction="sum"), values)
    assert {name: p.requires_grad for name, p in original(twins.bridge).named_parameters()} == frozen
    assert all(p.grad is None for p in original(twins.bridge).parameters())
    assert torch.is_grad_enabled()
    for row, text in enumerate(TEXTS):
        ids = ids_of(twins.bridge, text)
        own = [value[row].detach().clone().requires_grad_() for value in values]
        plain = [
            PlainEdit(site.name, layer, ids.shape[1] + position, value, op)
            for value, (site, layer, position, op) in zip(own, parts, strict=True)
        ]
        _, wanted_logits = hooked_run(twins, ids, plain, engine.info.n_heads, grad=True)
        loss = torch.nn.functional.cross_entropy(wanted_logits[-1:], target[row : row + 1])
        for mine, wanted in zip(actual, torch.autograd.grad(loss, own), strict=True):
            torch.testing.assert_close(mine[row], wanted, atol=1e-4, rtol=1e-3)


def test_without_grad_there_is_no_graph() -> None:
    engine = engine_of("llama")
    value = noise(4, 32).requires_grad_()
    made = engine.forward(tokens_of(engine, TEXTS), edits=Edits([Edit(value, torch.arange(4), 1)]), read=[RESID_POST])
    assert made.logits is not None
    assert not made.logits.requires_grad
    assert not made.reads[RESID_POST].requires_grad


# What is refused


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_pads_are_never_written(name: str) -> None:
    """The longest row has 8 tokens or more, the shortest fewer."""
    engine = engine_of(name)
    tokens = tokens_of(engine, TEXTS)
    lengths = tokens.mask.sum(dim=1)
    row = int(lengths.argmin())
    edits = Edits([Edit(noise(4, 32), torch.arange(4), 1, position=-int(lengths[row]) - 1)])
    with pytest.raises(tv.TvLensError, match=rf"row {row} has {lengths[row]} tokens, .* none at position -"):
        engine.forward(tokens, edits=edits)
    with pytest.raises(tv.TvLensError, match=r"so there is none at position -40"):
        engine.forward(tokens, edits=Edits([Edit(noise(1, 32), torch.tensor([0]), 1, position=-40)]))


def test_two_sets_of_one_cell_are_refused() -> None:
    rows = torch.tensor([0, 1])
    one, other = Edit(noise(2, 32), rows, 1), Edit(noise(1, 32), torch.tensor([1]), 1)
    with pytest.raises(tv.TvLensError, match="two edits set resid_post of layer 1 at position -1 in row 1"):
        Edits([one, other])
    Edits([one, Edit(noise(1, 32), torch.tensor([2]), 1)])
    Edits([one, Edit(noise(2, 32), rows, 1, position=-2)])
    Edits([one, Edit(noise(2, 32), rows, 1, op="add")])
    head = Edit(noise(2, 8), rows, 1, site=HEADS, head=0)
    Edits([head, Edit(noise(2, 8), rows, 1, site=HEADS, head=1)])
    with pytest.raises(tv.TvLensError, match="two edits set heads"):
        Edits([head, Edit(noise(2, 32), rows, 1, site=HEADS)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": noise(3, 32)}, "one vector for each of its rows"),
        ({"rows": torch.tensor([1, 1])}, "names a row twice"),
        ({"position": 0}, "positions count from the end of the prompt"),
        ({"layer": -1}, "a layer is 0 or more"),
        ({"op": "multiply"}, "an op is 'set', 'add' or 'rotate'"),
        ({"head": 1}, "resid_post has no heads"),
        ({"keep_norm": True}, "use op='add'"),
    ],
)
def test_an_edit_that_does_not_fit_together_is_refused(
    changes: dict[str, object], message: str, as_users_run_it: None
) -> None:
    good = {"value": noise(2, 32), "rows": torch.tensor([0, 1]), "layer": 1}
    Edit(**good)  # type: ignore[arg-type]
    with pytest.raises(tv.TvLensError, match=message):
        Edit(**{**good, **changes})  # type: ignore[arg-type]


def test_a_write_that_does_not_happen_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if TransformerLens had dropped the hooks of one layer."""
    bridge = make_twins("llama").bridge
    engine = tv.LocalEngine(bridge, progress=False)
    vectors = tv.TaskVectors(torch.ones(1, 4, 32), "tiny-llama", "t")
    tv.patch_generate(engine, list(TEXTS), vectors, tv.layers(1, 2), max_new_tokens=1)
    run = bridge.run_with_hooks

    def without_the_first(*args: Any, **options: Any) -> Any:
        return run(*args, **options | {"fwd_hooks": options["fwd_hooks"][1:]})

    monkeypatch.setattr(bridge, "run_with_hooks", without_the_first)
    with pytest.raises(RuntimeError, match="2 writes were to be made and 1 were"):
        tv.patch_generate(engine, list(TEXTS), vectors, tv.layers(1, 2), max_new_tokens=1)


def test_a_vector_of_another_width_is_an_error() -> None:
    engine = engine_of("llama")
    with pytest.raises(tv.EngineError, match="a vector of width 31 cannot be written into an activation of width 32"):
        engine.forward(tokens_of(engine, TEXTS), edits=Edits([Edit(noise(4, 31), torch.arange(4), 1)]))


def test_a_site_that_a_model_lacks_is_refused() -> None:
    engine = engine_of("mamba")
    with pytest.raises(TypeError, match="tiny-mamba gives no access to heads; it has resid_post"):
        engine.forward(tokens_of(engine, TEXTS), read=[HEADS])
    hybrid = engine_of("qwen3_next")
    with pytest.raises(tv.TvLensError, match=r"layer 0 of tiny-qwen3_next has no attn_out; the layers \[1\] have"):
        hybrid.forward(tokens_of(hybrid, TEXTS), edits=Edits([Edit(noise(4, 32), torch.arange(4), 0, site=ATTN_OUT)]))
    assert MLP_OUT in hybrid.sites


# Values


def test_edits_follow_their_rows() -> None:
    value = torch.arange(6.0).reshape(3, 2)
    edits = Edits([Edit(value, torch.tensor([4, 0, 2]), 1), Edit(value[:1], torch.tensor([3]), 2)])
    kept = edits.keep([2, 3, 4])
    assert [edit.rows.tolist() for edit in kept] == [[2, 0], [1]]
    assert kept[0].value.tolist() == [[0.0, 1.0], [4.0, 5.0]]
    assert edits.keep([1]) == ()
    wide = edits.keep([0, 2]).repeat(2)
    assert wide[0].rows.tolist() == [0, 1, 2, 3]
    assert wide[0].value.tolist() == [[2.0, 3.0]] * 2 + [[4.0, 5.0]] * 2
    side_by_side = Edits.interleave([edits, Edits(), edits])
    assert [edit.rows.tolist() for edit in side_by_side] == [[12, 0, 6], [9], [14, 2, 8], [11]]
    assert [edit.position for edit in edits.before(3)] == [-4, -4]
    assert (edits.reach, edits.before(3).reach, Edits().reach) == (1, 4, 1)
    assert edits.next_step() == ()
    again = Edits([Edit(value, torch.tensor([4, 0, 2]), 1, position=-5, op="add", every_step=True)]).next_step()
    assert [(edit.position, edit.every_step) for edit in again] == [(-1, True)]


def test_the_name_of_version_0_1_still_builds_edits() -> None:
    edits = tv.Patch(torch.eye(3), torch.tensor([2, 0, 2]))
    assert [(edit.layer, edit.rows.tolist()) for edit in edits] == [(0, [1]), (2, [0, 2])]
