"""Prompts as conversations, written as the chat template of a model's tokenizer writes them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tv_lens.errors import TvLensError
from tv_lens.prompts.formats import Example, PromptFormat, Segment, without_start_of
from tv_lens.prompts.templates import PAPER, Template

if TYPE_CHECKING:
    from tv_lens.engines import Model

Layout: TypeAlias = Literal["turns", "one turn"]
Message: TypeAlias = dict[str, str]
# From messages, and whether the assistant is to answer next, to the text of the conversation.
Render: TypeAlias = Callable[[list[Message], bool], str]

# Messages that no template has a reason to change.
_USER, _ASSISTANT, _NEXT_USER = "firstquestion", "firstanswer", "secondquestion"
_CONVERSATION = (Example("hot", "cold"), Example("up, or\nup there", "down"), Example("2 + 2", "4"))
_QUERY = "What is big?"


@dataclass(frozen=True)
class ChatTemplate(PromptFormat):
    """Demonstrations as a conversation with a chat model. `ChatTemplate.of(model)` makes one.

    In the layout "turns" each input is a message of the user and each output the assistant's. In the layout "one turn"
    one message of the user holds all demonstrations and the query, written by `Template(example, separator)`.

    Attributes:
        head: the text before the first message of the user, with BOS and system message.
        before: that after an assistant's message, before the next one of the user.
        between: that after a user's message, before the assistant's.
        after: that after the assistant's message.
        ask: what comes after the query.
        layout: "turns" or "one turn".
        before_answer: what comes after `ask`.
        example: how a demonstration is written in the layout "one turn".
        separator: what is between demonstrations in the layout "one turn".
        strips: whether the model's template drops white space around messages.

    Raises:
        TvLensError: an unknown layout.

    Examples:
        >>> chat = ChatTemplate("<s>", "[User] ", " [Bot] ", "\\n", " [Bot]")
        >>> chat.write([tv.Example("hot", "cold")], "big")
        '<s>hot [Bot] cold\\n[User] big [Bot]'
    """

    head: str
    before: str
    between: str
    after: str
    ask: str
    layout: Layout = "turns"
    before_answer: str = ""
    example: str = PAPER.example
    separator: str = PAPER.separator
    strips: bool = False

    def __post_init__(self) -> None:
        if self.layout not in ("turns", "one turn"):
            raise TvLensError(f"layout is {self.layout!r}; use 'turns' or 'one turn'")

    @staticmethod
    def of(
        model: Model,
        *,
        system: str | None = None,
        layout: Layout = "turns",
        before_answer: str = "",
        template: Template = PAPER,
        **options: Any,
    ) -> ChatTemplate:
        """The chat template of the model's tokenizer.

        Its pieces are cut out of a conversation that the tokenizer writes, and conversations put together from them are
        compared with the tokenizer's own.

        Args:
            model: a bridge or an engine.
            system: the system message. None leaves it out; some tokenizers then write their own.
            layout: "turns", or "one turn" with all demonstrations in a single message.
            before_answer: what each of the assistant's messages begins with, such as "Answer: ".
            template: how demonstrations are written in the layout "one turn".
            **options: passed to the tokenizer's `apply_chat_template`, for example `enable_thinking=False`.

        Returns:
            A prompt format.

        Raises:
            UnsupportedError: the tokenizer has no chat template.
            TvLensError: the template changes or drops messages, writes today's date, or writes BOS twice; the message
                shows the difference.
        """
        from tv_lens.engines import engine_for

        codec = engine_for(model).text

        def render(messages: list[Message], ask: bool) -> str:
            return codec.chat(_system(system) + messages, ask=ask, **options)

        _check_date(codec.info.name, render(_turns((), _USER), True), codec.chat_dates())
        chat = _pieces(render, layout)
        chat = replace(chat, before_answer=before_answer, example=template.example, separator=template.separator)
        _check_turns(chat, codec.info.name, render)
        ids = codec.to_ids(chat.write(_CONVERSATION, _QUERY))
        if codec.info.bos and [codec.token(each) for each in ids[:2]] == [codec.info.bos] * 2:
            raise TvLensError(
                f"a conversation with {codec.info.name} begins with {codec.info.bos!r} twice: its chat template writes "
                "it and its tokenizer adds it; pass LocalEngine(model, prepend_bos=False)"
            )
        return chat

    def segments(self, examples: Sequence[Example], query: str) -> list[Segment]:
        """The conversation up to where the assistant's answer to the query begins."""
        if self.layout == "one turn":
            segments = [Segment(self.head, "template"), *self._template.segments(examples, query)]
        else:
            segments = self._turns(examples) + [Segment(self._message(query), "query")]
        segments.append(Segment(self.ask + self.beginning, "separator"))
        return [segment for segment in segments if segment.text]

    @property
    def stop(self) -> str | None:
        """What ends the assistant's message."""
        for text in (self.after, self.after + self.before):
            if text.strip():
                return text
        return None

    def continuation(self, query: str, answer: str) -> str:
        """The answer, with what the template writes before it but does not ask with."""
        return answer if self.before_answer else self._lead + answer

    def cut(self, text: str) -> str:
        """The answer in a completion: the assistant's message, without white space around it."""
        return (text if self.stop is None else text.split(self.stop, 1)[0]).strip()

    def settled(self, text: str) -> str:
        """The part of the message that is settled: what comes before its end and before anything that may become it."""
        stop = self.stop
        return (text if stop is None else without_start_of(stop, text.split(stop, 1)[0])).strip()

    @property
    def _template(self) -> Template:
        return Template(self.example, self.separator)

    @property
    def beginning(self) -> str:
        """How the assistant's answer begins in the prompt: nothing without `before_answer`."""
        return self._lead + self.before_answer if self.before_answer else ""

    @property
    def _lead(self) -> str:
        """What is between a question and its answer beyond what asks for it: in some templates a space."""
        return self.between.removeprefix(self.ask) if self.between.startswith(self.ask) else ""

    def _turns(self, examples: Sequence[Example]) -> list[Segment]:
        segments = [Segment(self.head, "template")]
        for example in examples:
            segments += [
                Segment(self._message(example.input), "input"),
                Segment(self.between + self.before_answer, "separator"),
                Segment(self._message(example.output), "output"),
                Segment(self.after, "boundary"),
                Segment(self.before, "template"),
            ]
        return segments

    def _message(self, text: str) -> str:
        if self.strips and text != text.strip():
            raise TvLensError(
                f"the message {text!r} has white space around it, which the model's chat template would drop; strip it"
            )
        return text


def _system(system: str | None) -> list[Message]:
    return [] if system is None else [{"role": "system", "content": system}]


def _turns(examples: Sequence[Example], query: str | None) -> list[Message]:
    messages = []
    for question, answer in examples:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages + ([] if query is None else [{"role": "user", "content": query}])


def _pieces(render: Render, layout: Layout) -> ChatTemplate:
    """The texts between the messages of a conversation."""
    one = Example(_USER, _ASSISTANT)
    head, between, end = _between(render(_turns([one], None), False), one)
    if layout == "one turn":
        head, ask = _between(render(_turns((), _USER), True), (_USER,))
        after, before = end, ""
    else:
        head, between, middle, ask = _between(render(_turns([one], _NEXT_USER), True), (*one, _NEXT_USER))
        after = commonprefix([middle, end]) or middle  # noqa: RUF071 - characters are what it compares
        before = middle.removeprefix(after)
    padded = render(_turns([Example(f" {_USER} ", f" {_ASSISTANT} ")], None), False)
    strips = not all(f" {text} " in padded for text in one)
    return ChatTemplate(head, before, between, after, ask, layout=layout, strips=strips)


def _between(text: str, messages: Sequence[str]) -> list[str]:
    """The texts around the messages, each of which occurs once and in order."""
    pieces = []
    for message in messages:
        if text.count(message) != 1:
            raise TvLensError(
                f"the chat template writes the message {message!r} {text.count(message)} times, not once; it cannot be "
                "used for prompts"
            )
        piece, text = text.split(message)
        pieces.append(piece)
    return [*pieces, text]


def _check_date(name: str, text: str, dates: Sequence[str]) -> None:
    """Raise TvLensError if a conversation holds one of the `dates`."""
    dated = [line for line in text.splitlines() if any(date in line for date in dates)]
    if dated:
        raise TvLensError(
            f"the chat template of {name} writes today's date ({dated[0]!r}), so the same prompts would be different "
            "tomorrow; pass the date that it is to write, in most templates date_string='1 Jan 2026'"
        )


def _difference(expected: str, actual: str) -> str:
    lines = difflib.ndiff(expected.splitlines(), actual.splitlines())
    return "\n".join(repr(line)[1:-1] for line in lines if line[0] in "+-")


def _check_turns(chat: ChatTemplate, name: str, render: Render) -> None:
    """Compare conversations of several lengths with the tokenizer's own.

    Raises:
        TvLensError: they differ; the message shows how.
    """
    for n in range(len(_CONVERSATION) + 1):
        examples = _CONVERSATION[:n]
        if chat.layout == "one turn":
            messages = _turns((), Template(chat.example, chat.separator).write(examples, _QUERY))
        else:
            shown = [Example(question, chat.before_answer + answer) for question, answer in examples]
            messages = _turns(shown, _QUERY)
        expected = render(messages, True) + chat.beginning
        actual = chat.write(examples, _QUERY)
        if actual != expected:
            raise TvLensError(
                f"the chat template of {name} does not write every turn alike, so prompts cannot be put together from "
                f"it (- the tokenizer's, + from its pieces):\n{_difference(expected, actual)}\n"
                "try layout='one turn', or no system message"
            )
