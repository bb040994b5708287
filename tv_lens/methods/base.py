"""What a method is: something that makes task vectors for a task from its prompts.

A custom method is a frozen dataclass that derives from `Method`, names itself and defines `__call__`. Its fields are
its options, which go into the vectors' provenance and an experiment's settings.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

from tv_lens.edits import RESID_POST, SITES, Site, Write
from tv_lens.engines import Engine
from tv_lens.errors import TvLensError
from tv_lens.prompts import Prompt
from tv_lens.provenance import Option
from tv_lens.shuffling import shuffle_outputs
from tv_lens.tasks import Task
from tv_lens.vectors import TaskVectors

# Several methods, or several under names that tell them apart.
Methods: TypeAlias = "Sequence[Method] | Mapping[str, Method]"

# Every method by its name, so that the one that made some vectors can be used again.
METHODS: dict[str, type[Method]] = {}


@dataclasses.dataclass(frozen=True)
class Read:
    """A prompt that a method reads at its last token. With `judged`, the method also asks how likely the first token of
    the prompt's answer is.
    """

    prompt: Prompt
    site: Site = RESID_POST
    judged: bool = False


class Method(ABC):
    """A way to make task vectors. A custom one is a frozen dataclass that derives from this class and defines
    `__call__`, a function of engine, task, prompts and seed that returns vectors (see `docs/extending.md`).
    Its fields are its options.

    Attributes:
        name: tells it from others in tables and files.

    Examples:
        >>> tv.Extraction(substitutes=1)(model, task, prompts, 0).values.shape
        torch.Size([4, 4, 32])
    """

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        METHODS[cls.name] = cls

    @abstractmethod
    def __call__(self, engine: Engine, task: Task, prompts: Sequence[Prompt], seed: int) -> TaskVectors:
        """One vector per prompt and layer, or one for all prompts."""

    def reads(self, task: Task, prompts: Sequence[Prompt], seed: int) -> Sequence[Read]:
        """What a call with the same arguments reads at last tokens, so that an experiment can read it for all methods
        in one pass. A method that names nothing reads by itself.

        Args:
            task: the task of the prompts.
            prompts: as in a call.
            seed: as in a call.

        Returns:
            What a call with the same arguments reads at last tokens.
        """
        return ()

    @property
    def uses_answers(self) -> bool:
        """Whether the vectors are learned from the prompts' answers, so that they must not be made of test prompts."""
        return False

    def shuffled(self, prompts: Sequence[Prompt], seed: int) -> list[Prompt] | None:
        """The prompts without what the method reads the task from, for the control `shuffled`: by default with the
        outputs of each prompt's demonstrations permuted. None if there is too little to permute.

        Args:
            prompts: as in a call.
            seed: the same seed gives the same result.

        Returns:
            Prompts for the control, or None.
        """
        if min(prompt.shots for prompt in prompts) < 2:
            return None
        return shuffle_outputs(prompts, seed)

    def for_control(self, layers: tuple[int, ...]) -> Method:
        """The method for a control that is written to these layers: itself, unless it can save work by knowing them.

        Args:
            layers: where the control is written.

        Returns:
            A method.
        """
        return self

    @property
    def options(self) -> dict[str, Option]:
        """The method's fields as JSON values."""
        if not dataclasses.is_dataclass(self):
            return {}
        return {field.name: as_option(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"


def method_of(vectors: TaskVectors) -> Method | None:
    """The method that made the vectors, by their provenance; None if they are a sum or were made by hand."""
    name = vectors.method.removeprefix("mean of ")
    kind = METHODS.get(name)
    if kind is None or len(vectors.terms) > 1 or not dataclasses.is_dataclass(kind):
        return None
    known = {field.name for field in dataclasses.fields(kind)}
    options = {name: option_value(name, value) for name, value in vectors.options.items() if name in known}
    try:
        method: Method = kind(**options)
    except TvLensError:  # made from something that has no name, such as other vectors
        return None
    return method


def named_methods(methods: Methods) -> dict[str, Method]:
    """The methods by the names that they have in tables and files.

    Raises:
        TvLensError: no methods, something else, or two of one name.
    """
    given = list(methods.values()) if isinstance(methods, Mapping) else methods
    if isinstance(given, Method) or not given or not all(isinstance(each, Method) for each in given):
        raise TvLensError(f"methods are {methods!r}; give a list of methods, such as [Extraction(substitutes=2)]")
    names = list(methods) if isinstance(methods, Mapping) else [method.name for method in given]
    if len(set(names)) < len(names) or not all(isinstance(name, str) and name for name in names):
        raise TvLensError(
            f"methods are named {names}; give each a different name, for two of a kind as a dictionary: "
            '{"few substitutes": Extraction(substitutes=1), "many": Extraction(substitutes=5)}'
        )
    return dict(zip(names, given, strict=True))


def settings_of(name: str, method: Method) -> dict[str, Option]:
    """A method's options as an experiment's settings hold them; with the kind of method, if `name` is another."""
    return method.options if name == method.name else {"method": method.name, **method.options}


def as_option(value: Any) -> Option:
    """A field's value as a JSON value."""
    if isinstance(value, Site):
        return value.name
    if isinstance(value, Write):
        return [value.op, value.strength, value.every_step, value.keep_norm]
    return list(value) if isinstance(value, tuple) else value


def option_value(name: str, value: Option) -> Any:
    """The value of the field `name` that `as_option` has turned into a JSON value."""
    if name == "site" and isinstance(value, str):
        return SITES[value]
    if name == "how" and isinstance(value, list):
        return Write(*value)
    return tuple(option_value("", each) for each in value) if isinstance(value, list) else value
