"""From options to a model, a method and a prompt format."""

from __future__ import annotations

import tv_lens as tv


def load_engine(
    model: str | None, *, device: str | None, dtype: str, batch_size: int | None, quiet: bool
) -> tv.LocalEngine:
    """The model, or the demo model; its options are checked."""
    import torch

    from tv_lens.engines.booting import boot

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    bridge = tv.demo_model() if model is None else boot(model, device=device, dtype=dtypes[dtype])
    return tv.LocalEngine(bridge, batch_size=batch_size, progress=not quiet)


def method_of(substitutes: int, across: bool) -> tv.Method:
    return tv.AcrossPrompts() if across else tv.Extraction(substitutes=substitutes)


def template_of(example: str, separator: str) -> tv.Template:
    return tv.Template(example, separator.replace(r"\n", "\n").replace(r"\t", "\t"))


def prompt_format(
    engine: tv.LocalEngine, written: tv.Template, chat: bool, one_turn: bool, system: str | None
) -> tv.PromptFormat:
    """How prompts are written: by the template, or as conversations."""
    if not chat:
        return written
    return tv.ChatTemplate.of(engine, system=system, layout="one turn" if one_turn else "turns", template=written)
