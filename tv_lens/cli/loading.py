"""From options to a model, a method and a prompt format."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NamedTuple

import tv_lens as tv
from tv_lens.cli.checks import MethodChoice, UsageError, check_chat
from tv_lens.progress import bar, stage


@contextmanager
def loading(model: str | None, *, quiet: bool) -> Iterator[None]:
    """Say that the model is loaded inside."""
    with stage(f"loading {model or 'the demo model'}"), bar(None, shown=not quiet):
        yield


@contextmanager
def _downloads_alone(quiet: bool) -> Iterator[None]:
    """Hide the bars of other libraries, except those of downloads on a terminal."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers import utils

    logging: Any = utils.logging  # not all of its functions have types
    others, downloads = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if downloads and not quiet and sys.stderr.isatty():
        enable_progress_bars()
    try:
        yield
    finally:
        if others:
            logging.enable_progress_bar()
        if not downloads:
            disable_progress_bars()


def load_engine(
    model: str | None, *, device: str | None, dtype: str, batch_size: int | None, quiet: bool
) -> tv.LocalEngine:
    """The model, or the demo model; its options are checked."""
    import torch

    from tv_lens.engines.booting import boot

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    with _downloads_alone(quiet):
        bridge = tv.demo_model() if model is None else boot(model, device=device, dtype=dtypes[dtype])
    return tv.LocalEngine(bridge, batch_size=batch_size, progress=not quiet)


def method_of(choice: MethodChoice | None, substitutes: int, across: bool) -> tv.Method:
    """The method that the options name.

    Raises:
        UsageError: an option that the method does not have, or a value that it refuses.
    """
    from tv_lens.methods.base import METHODS

    if choice is None:
        return tv.AcrossPrompts() if across else tv.Extraction(substitutes=substitutes)
    kind: Any = METHODS[choice.name]
    known = [each.name for each in fields(kind)]
    unknown = [name for name in choice.options if name not in known]
    if unknown:
        raise UsageError(f"{choice.name} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    given = {"substitutes": substitutes} if "substitutes" in known else {}
    try:
        method: tv.Method = kind(**{**given, **{name: _value(name, each) for name, each in choice.options.items()}})
    except tv.TvLensError as error:
        raise UsageError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"--method {choice.name}: {choice.options} are not options that it takes ({error})") from error
    return method


def _value(name: str, value: Any) -> Any:
    """An option's value as the method takes it."""
    from tv_lens.edits import SITES

    if isinstance(value, list):
        return tuple(tuple(each) if isinstance(each, list) else each for each in value)
    if name == "how" and value in ("overwrite", "add"):
        return tv.overwrite if value == "overwrite" else tv.add()
    if name == "site":
        return SITES.get(value, value)
    return value


class Wording(NamedTuple):
    """How a command's prompts are written: by a template, or as conversations of the model that is loaded later."""

    template: tv.Template
    chat: bool
    one_turn: bool
    system: str | None

    @staticmethod
    def of(example: str, separator: str, *, chat: bool, one_turn: bool, system: str | None) -> Wording:
        """The options, checked.

        Raises:
            UsageError: options of conversations that would do nothing.
        """
        template = tv.Template(*(text.replace(r"\n", "\n").replace(r"\t", "\t") for text in (example, separator)))
        check_chat(template, chat=chat, one_turn=one_turn, system=system)
        return Wording(template, chat, one_turn, system)

    def format(self, engine: tv.LocalEngine | None = None) -> tv.PromptFormat:
        """The prompt format. Without a model it is the template, which shows mistakes before a model is loaded."""
        if engine is None or not self.chat:
            return self.template
        layout: Any = "one turn" if self.one_turn else "turns"
        return tv.ChatTemplate.of(engine, system=self.system, layout=layout, template=self.template)
