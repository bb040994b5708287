"""Prompts as plain text: demonstrations written by a pattern, or a text as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tv_lens.errors import TvLensError
from tv_lens.prompts.formats import Example, PromptFormat, Segment, without_start_of


@dataclass(frozen=True)
class Template(PromptFormat):
    r"""How demonstrations and the query are written.

    The query is `example` up to just before `{output}`, without trailing spaces, so that the answer's own leading space
    stays with the answer's token. The paper's form, which is the default of prompts, is `PAPER`.

    Attributes:
        example: a demonstration. It holds `{input}` and then `{output}`, each once. Everything else in it, other braces
            included, is written literally.
        separator: what is between demonstrations; answers end there.

    Raises:
        TvLensError: `{input}` or `{output}` is missing, repeated or in the wrong order, or the separator is empty.

    Examples:
        >>> Template().show(Example("hot", "cold"))
        'hot -> cold'
        >>> Template("Q: {input}\nA: {output}", separator="\n\n").ask("hot")
        'Q: hot\nA:'
    """

    example: str = "{input} -> {output}"
    separator: str = "\n"

    def __post_init__(self) -> None:
        if not (isinstance(self.example, str) and isinstance(self.separator, str)):
            raise TvLensError(f"a template's example and separator are texts, not {self.example!r}, {self.separator!r}")
        for field in ("{input}", "{output}"):
            if self.example.count(field) != 1:
                raise TvLensError(
                    f"template {self.example!r} has {field} {self.example.count(field)} times; "
                    "write {input} and {output} once each, as in '{input} -> {output}'"
                )
        if self.example.index("{input}") > self.example.index("{output}"):
            raise TvLensError(
                f"template {self.example!r} has {{output}} before {{input}}; the model answers "
                "what comes last, so write {input} first"
            )
        if not self.separator:
            raise TvLensError("the template's separator is empty, so no answer would end; use '\\n' or another text")

    @property
    def stop(self) -> str:
        """The separator between demonstrations."""
        return self.separator

    # Split and joined instead of formatted: braces in the data, and in the rest of the template, are literal text.
    def _parts(self) -> tuple[str, str, str]:
        before, rest = self.example.split("{input}")
        between, after = rest.split("{output}")
        return before, between, after

    def show(self, example: Example) -> str:
        """The text of one demonstration.

        Args:
            example: a demonstration.

        Returns:
            Its text.
        """
        before, between, after = self._parts()
        return before + example.input + between + example.output + after

    def ask(self, query: str) -> str:
        """The text that asks for the output of `query`.

        Args:
            query: what is asked.

        Returns:
            The text that asks for its output.
        """
        before, between, _ = self._parts()
        return (before + query + between).rstrip(" ") if between else before + query

    def segments(self, examples: Sequence[Example], query: str) -> list[Segment]:
        """Demonstrations, each followed by the separator, then the query without trailing spaces."""
        before, between, after = self._parts()
        segments = []
        for example in examples:
            segments += [
                Segment(before, "template"),
                Segment(example.input, "input"),
                Segment(between, "separator"),
                Segment(example.output, "output"),
                Segment(after, "template"),
                Segment(self.separator, "boundary"),
            ]
        # `ask` leaves out trailing spaces.
        rest = len(self.ask(query))
        for last in (Segment(before, "template"), Segment(query, "query"), Segment(between, "separator")):
            segments.append(last._replace(text=last.text[: max(0, rest)]))
            rest -= len(last.text)
        return [segment for segment in segments if segment.text]

    def continuation(self, query: str, answer: str) -> str:
        """The answer, with the spaces that `ask` left out before it."""
        before, between, _ = self._parts()
        return (before + query + between)[len(self.ask(query)) :] + answer

    def cut(self, text: str) -> str:
        r"""The answer in a completion: up to the separator, without what the template writes after an
        output, and without white space around it.

        >>> Template().cut(" cold\nbig -> small")
        'cold'
        """
        *_, after = self._parts()
        answer = text.split(self.separator, 1)[0].strip()
        return answer.removesuffix(after.strip()).rstrip()

    def settled(self, text: str) -> str:
        r"""The part of the answer that is settled: what comes before the separator or the template's end, and before
        anything that may become one of them.

        >>> Template("{input} -> {output} ##", separator="\n\n").settled(" cold #")
        'cold'
        """
        *_, after = self._parts()
        answer = without_start_of(self.separator, text.split(self.separator, 1)[0]).strip()
        return without_start_of(after.strip(), answer).rstrip()


# How the paper writes its prompts; the default everywhere.
PAPER = Template("example:{input}->{output}")
"""The template of Hendel et al. (2023), which is the default: `example:hot->cold`."""


@dataclass(frozen=True)
class PlainText(PromptFormat):
    """A text without demonstrations, continued until the model ends it. Completions are kept as they are.

    Examples:
        >>> PlainText().write((), "Once upon")
        'Once upon'
    """

    def segments(self, examples: Sequence[Example], query: str) -> list[Segment]:
        """The text itself."""
        if examples:
            raise TvLensError("a plain text has no demonstrations; use a Template to write them")
        return [Segment(query, "query")]

    def cut(self, text: str) -> str:
        """All of it, white space included."""
        return text

    def settled(self, text: str) -> str:
        """All of it."""
        return text


@dataclass(frozen=True)
class FreeText(PromptFormat):
    """A sentence without demonstrations, continued until the model ends it. The answer is all of the completion; a rule
    such as `occurs` looks for the expected one in it.

    Attributes:
        text: the sentence, with `{input}` in it.

    Raises:
        TvLensError: `{input}` is missing or repeated.

    Examples:
        >>> FreeText("The opposite of {input} is").write((), "hot")
        'The opposite of hot is'
    """

    text: str = "{input} means"

    def __post_init__(self) -> None:
        if self.text.count("{input}") != 1:
            raise TvLensError(
                f"free text {self.text!r} has {{input}} {self.text.count('{input}')} times; write it once"
            )

    def segments(self, examples: Sequence[Example], query: str) -> list[Segment]:
        """The sentence around the query."""
        if examples:
            raise TvLensError("free text has no demonstrations; use a Template to write them")
        before, after = self.text.split("{input}")
        parts = (Segment(before, "template"), Segment(query, "query"), Segment(after, "separator"))
        return [part for part in parts if part.text]

    def continuation(self, query: str, answer: str) -> str:
        """The answer as the next word."""
        return answer if self.text.endswith(" ") else f" {answer}"

    def cut(self, text: str) -> str:
        """All of it, without white space around it."""
        return text.strip()

    def settled(self, text: str) -> str:
        """All of it, without white space around it."""
        return text.strip()
