"""A few-shot prompt as a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tv_lens.errors import TvLensError
from tv_lens.prompts.formats import Example, PromptFormat, Segment
from tv_lens.prompts.templates import PAPER, PlainText


@dataclass(frozen=True)
class Prompt:
    """Demonstrations and a query.

    Attributes:
        examples: the demonstrations, `Example`s or plain pairs.
        query: what is asked.
        answer: the expected output.
        template: how they are written.
        task: the name of the task that the prompt was sampled from.

    Examples:
        >>> prompt = Prompt((Example("hot", "cold"), Example("big", "small")), "tall", answer="short")
        >>> print(prompt.text)
        example:hot->cold
        example:big->small
        example:tall->
        >>> prompt.zero_shot().text
        'example:tall->'
    """

    examples: tuple[Example, ...]
    query: str
    answer: str | None = None
    template: PromptFormat = PAPER
    task: str = ""

    def __post_init__(self) -> None:
        # Convert plain pairs to `Example`.
        object.__setattr__(self, "examples", tuple(Example(*pair) for pair in self.examples))

    @property
    def text(self) -> str:
        """The whole prompt as the model sees it."""
        return self.template.write(self.examples, self.query)

    @property
    def segments(self) -> Sequence[Segment]:
        """The text in pieces, with what each is for."""
        return self.template.segments(self.examples, self.query)

    @property
    def shots(self) -> int:
        """The number of demonstrations."""
        return len(self.examples)

    @property
    def inputs(self) -> frozenset[str]:
        """Every input that it shows or asks."""
        return frozenset((self.query, *(example.input for example in self.examples)))

    def zero_shot(self) -> Prompt:
        """The query alone, without demonstrations."""
        return replace(self, examples=())

    def asking(self, query: str) -> Prompt:
        """The same demonstrations with another query, whose answer is not known.

        Args:
            query: the other query.

        Returns:
            A prompt whose answer is not known.
        """
        return replace(self, query=query, answer=None)


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Raise TvLensError if `prompts` is empty or contains anything but `Prompt`."""
    if isinstance(prompts, (str, Prompt)) or not len(prompts):
        raise TvLensError(
            f"expected a list of at least one Prompt, not {prompts!r}; task.sample(n, shots=..., seed=...) makes one"
        )
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt):
            raise TvLensError(
                f"prompt {i} is a {type(prompt).__name__}; write it as Prompt(examples, query), or "
                "Prompt((), text, template=...) for a query alone"
            )


def as_prompts(prompts: Sequence[Prompt | str]) -> list[Prompt]:
    """The prompts, each plain string converted to a prompt (`PlainText`).

    Raises:
        TvLensError: no prompts, or something else than prompts and strings.
    """
    if isinstance(prompts, (str, Prompt)):
        check_prompts(prompts)  # type: ignore[arg-type]
    converted = [Prompt((), each, template=PlainText()) if isinstance(each, str) else each for each in prompts]
    check_prompts(converted)
    return converted
