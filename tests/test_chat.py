"""Chat templates: prompts equal to what the tokenizer writes, one BOS, and answers that end with the turn."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_tokenizer, make_twins
from passes import read_texts
from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv

# Templates in the style of four model families, in our own words.
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('there is no system role') }}{% endif %}"
    "<|turn|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|/turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "[INST] {{ (s if loop.first else '') + m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
STYLES = {"chatml": CHATML, "llama 3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL}
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|header|>", "<|/header|>", "<|eot|>", "<|turn|>", "<|/turn|>"]
END_OF_TURN = {"chatml": "<|im_end|>", "llama 3": "<|eot|>", "gemma": "<|/turn|>", "mistral": "</s>"}

EXAMPLES = tuple(tv.Example(f"input {i}", f"output {i}") for i in range(5))


def model_with(template: str | None, *, bos: bool = True) -> TransformerBridge:
    tokenizer = make_tokenizer(bos=bos)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    tokenizer.chat_template = template
    return make_twins("llama", tokenizer, vocab_size=320, max_position_embeddings=512).bridge


def conversation(examples: tuple[tv.Example, ...], query: str, system: str | None = None) -> list[dict[str, str]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for example in examples:
        messages.append({"role": "user", "content": example.input})
        messages.append({"role": "assistant", "content": example.output})
    return [*messages, {"role": "user", "content": query}]


def written_by_the_tokenizer(model: TransformerBridge, messages: list[dict[str, str]]) -> str:
    tokenizer: Any = model.tokenizer
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("system", [None, "Give the opposite."])
@pytest.mark.parametrize("turns", [0, 1, 2, 5])
def test_turns_are_what_the_tokenizer_writes(style: str, system: str | None, turns: int) -> None:
    model = model_with(STYLES[style])
    if style == "gemma" and system is not None:
        with pytest.raises(tv.TvLensError, match="refuses the messages: there is no system role"):
            tv.ChatTemplate.of(model, system=system)
        return
    prompt = tv.Prompt(EXAMPLES[:turns], "query", template=tv.ChatTemplate.of(model, system=system))
    assert prompt.text == written_by_the_tokenizer(model, conversation(EXAMPLES[:turns], "query", system))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("turns", [0, 3])
def test_one_turn_is_what_the_tokenizer_writes(style: str, turns: int) -> None:
    model, inner = model_with(STYLES[style]), tv.Template("Q: {input} A: {output}", separator="\n\n")
    chat = tv.ChatTemplate.of(model, layout="one turn", template=inner)
    prompt = tv.Prompt(EXAMPLES[:turns], "query", template=chat)
    message = "".join(f"Q: input {i} A: output {i}\n\n" for i in range(turns)) + "Q: query A:"
    assert prompt.text == written_by_the_tokenizer(model, conversation((), message))


@pytest.mark.parametrize("style", STYLES)
def test_the_answer_can_be_begun(style: str) -> None:
    model = model_with(STYLES[style])
    chat = tv.ChatTemplate.of(model, before_answer="Answer: ")
    begun = tuple(tv.Example(each.input, f"Answer: {each.output}") for each in EXAMPLES[:2])
    expected = written_by_the_tokenizer(model, conversation(begun, "query"))
    lead = " " if style == "mistral" else ""
    assert tv.Prompt(EXAMPLES[:2], "query", template=chat).text == expected + lead + "Answer: "


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("bos", [True, False])
def test_a_conversation_has_one_bos(style: str, bos: bool) -> None:
    """Whether the chat template writes it, the tokenizer adds it, or both would."""
    model = model_with(STYLES[style], bos=bos)
    prompt = tv.Prompt(EXAMPLES[:2], "query", template=tv.ChatTemplate.of(model))
    engine = tv.LocalEngine(model)
    [ids] = engine.text.encode([prompt.text])
    tokenizer: Any = model.tokenizer
    expected = tokenizer.apply_chat_template(
        conversation(EXAMPLES[:2], "query"), add_generation_prompt=True, return_dict=False
    )
    first = 0 if bos else 1  # without a BOS token TransformerLens uses the end-of-text token
    assert ids == [first, *(expected[1:] if expected[0] == first else expected)]
    assert ids.count(0) == bos


@pytest.mark.parametrize("style", STYLES)
def test_an_answer_ends_with_the_turn(style: str) -> None:
    """Special tokens have no text, so the answer is cut by their ids."""
    model = model_with(STYLES[style])
    tokenizer: Any = model.tokenizer
    answer, end = tokenizer("cold", add_special_tokens=False)["input_ids"], END_OF_TURN[style]
    script = [*answer, tokenizer.convert_tokens_to_ids(end), *answer, *answer]
    steps: list[int] = []

    def scripted(logits: torch.Tensor, keys: Any) -> torch.Tensor:
        steps.append(len(keys))
        return torch.full((len(keys),), script[len(steps) - 1])

    prompts = [tv.Prompt(EXAMPLES[:n], "query", template=tv.ChatTemplate.of(model)) for n in (1, 2)]
    actual = tv.generate(model, prompts, max_new_tokens=len(script), sampler=scripted)
    assert actual.texts == ("cold", "cold")
    assert len(steps) == len(answer) + 1


@pytest.mark.parametrize("layout", ["turns", "one turn"])
def test_a_task_vector_is_read_and_written_where_the_answer_begins(layout: Any, tmp_path: Path) -> None:
    model = model_with(CHATML)
    chat = tv.ChatTemplate.of(model, system="Short answers.", layout=layout)
    task = tv.Task("upper", ("a", "b", "cold", "dog", "fox", "hot"), str.upper)
    prompts = task.sample(3, shots=2, seed=0, template=chat)
    table = tv.show_tokens(model, prompts[0], positions="separators")
    assert "nothing is put in front" not in table.bos  # ChatML writes no BOS, so one is added
    newlines = [token for token, edited in zip(table.tokens, table.edited, strict=True) if edited]
    assert len(newlines) == 3
    assert newlines[-1] == "\n"  # after <|im_start|>assistant
    vectors = tv.extract(model, prompts, task.substitutes(prompts, 1, seed=0))
    own = read_texts(tv.LocalEngine(model), [prompt.text for prompt in prompts])
    written_back = replace(vectors, values=own)
    torch.testing.assert_close(
        tv.patched_logits(model, prompts, written_back, 1, keep_demonstrations=True),
        tv.patched_logits(model, prompts, vectors * 0, 1, how=tv.add(), keep_demonstrations=True),
        atol=1e-4,
        rtol=0,
    )
    experiment = tv.run_experiment(
        model,
        [task],
        shots=1,
        n_dev=2,
        n_test=2,
        substitutes=1,
        max_new_tokens=2,
        template=chat,
        folder=tmp_path / "run",
    )
    assert experiment.settings.template == chat.to_dict()
    vectors.save(tmp_path / "vectors.safetensors")
    code = "import sys, tv_lens as tv; print(repr(tv.TaskVectors.load(sys.argv[1]).template))"
    run = [sys.executable, "-c", code, str(tmp_path / "vectors.safetensors")]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == repr(chat)


def test_a_table_of_tokens_says_whose_bos_it_is() -> None:
    model = model_with(LLAMA3)
    table = tv.show_tokens(model, tv.Prompt((), "query", template=tv.ChatTemplate.of(model)))
    assert table.bos == "the text begins with its own '<s>', so nothing is put in front"
    assert table.tokens.count("<s>") == 1


def test_the_expected_answer_continues_the_prompt() -> None:
    """In a template with a space before the answer, that space belongs to the answer's first token."""
    model = model_with(MISTRAL)
    chat = tv.ChatTemplate.of(model)
    assert chat.continuation("query", "cold") == " cold"
    assert tv.ChatTemplate.of(model, before_answer="A:").continuation("query", "cold") == "cold"
    asked, answered = conversation((), "query"), conversation((tv.Example("query", "cold"),), "next")
    prompt = tv.Prompt((), "query", template=chat)
    assert prompt.text == written_by_the_tokenizer(model, asked)
    assert written_by_the_tokenizer(model, answered).startswith(prompt.text + " cold")


DROPS_EARLIER_ANSWERS = CHATML.replace(
    "{{ m.content }}", "{{ m.content if m.role == 'user' or loop.last or loop.index < 3 else '...' }}"
)
SYSTEM_LAST = (
    "{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {{ 'Be brief. ' if loop.last else '' }}{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
DATED = "{{ bos_token }}Today is {{ date_string or strftime_now('%d %b %Y') }}.\n" + GEMMA.removeprefix(
    "{{ bos_token }}"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "tiny-llama has no chat template; use a Template"),
        (DROPS_EARLIER_ANSWERS, r"does not write every turn alike(.|\n)*- \.\.\.(.|\n)*try layout='one turn'"),
        (SYSTEM_LAST, "does not write every turn alike"),
        (DATED, r"writes today's date \('.*Today is \d\d \w\w\w 2\d\d\d\.'\).*date_string="),
        (CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"), "the message 'firstquestion' 2 times"),
        (CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), "the message 'firstquestion' 0 times"),
        ("{{ bos_token }}{{ bos_token }}" + CHATML, "begins with '<s>' twice"),
    ],
)
def test_templates_that_rewrite_are_refused(template: str | None, message: str, as_users_run_it: None) -> None:
    model = model_with(template)
    with pytest.raises(tv.TvLensError, match=message):
        tv.ChatTemplate.of(model)


def test_a_template_that_rewrites_turns_can_be_used_in_one_turn() -> None:
    model = model_with(SYSTEM_LAST)
    chat = tv.ChatTemplate.of(model, layout="one turn")
    assert tv.Prompt(EXAMPLES[:1], "q", template=chat).text == (
        "[INST] Be brief. example:input 0->output 0\nexample:q->[/INST]"
    )


def test_a_date_can_be_given() -> None:
    chat = tv.ChatTemplate.of(model_with(DATED), date_string="1 Jan 2026")
    assert chat.head.startswith("<s>Today is 1 Jan 2026.\n")


def test_white_space_that_the_template_would_drop_is_refused(as_users_run_it: None) -> None:
    prompt = tv.Prompt((tv.Example("hot", " cold"),), "big", template=tv.ChatTemplate.of(model_with(LLAMA3)))
    with pytest.raises(tv.TvLensError, match="the message ' cold' has white space around it.*strip it"):
        _ = prompt.text
    assert " cold" in replace(prompt, template=tv.ChatTemplate.of(model_with(CHATML))).text


def test_a_wrong_layout_says_which_there_are(as_users_run_it: None) -> None:
    with pytest.raises(tv.TvLensError, match="layout is 'chat'; use 'turns' or 'one turn'"):
        tv.ChatTemplate.of(model_with(CHATML), layout="chat")  # type: ignore[arg-type]


def test_options_of_the_tokenizers_template_are_passed_on() -> None:
    """As `enable_thinking=False` is, which writes an empty thought where the assistant begins."""
    thinking = CHATML.replace(
        "<|im_start|>assistant\n{% endif %}",
        "<|im_start|>assistant\n{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}",
    )
    chat = tv.ChatTemplate.of(model_with(thinking), enable_thinking=False)
    text = tv.Prompt(EXAMPLES[:1], "query", template=chat).text
    assert text.endswith("<|im_start|>assistant\n<think></think>")
    assert text.count("<think>") == 1


def test_the_demo_model_answers_in_turns(demo: TransformerBridge) -> None:
    chat = tv.ChatTemplate.of(demo, system="Answer with one word.")
    task = tv.library()["present_to_past"]
    prompts = task.sample(10, shots=5, seed=0, template=chat)
    tokenizer: Any = demo.tokenizer
    messages = conversation(prompts[0].examples, prompts[0].query, "Answer with one word.")
    assert prompts[0].text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    actual = tv.generate(tv.LocalEngine(demo, progress=False), prompts)
    ends = {tokenizer.eos_token_id}
    assert sum(bool(ends & set(row)) for row in actual.tokens.tolist()) >= 8
    assert tv.score(task, prompts, actual).accuracy >= 0.3
