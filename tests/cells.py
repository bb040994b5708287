"""What the workers of the tests of grids import: a model, tasks, and methods that can be watched, fail, or kill."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from models import make_twins
from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv


def boot() -> tv.LocalEngine:
    """A tiny random model."""
    return tv.LocalEngine(model(), progress=False)


def model() -> TransformerBridge:
    """The model alone."""
    return make_twins("llama").bridge


def odd(prediction: str, answer: str) -> bool:
    """A rule by which a random model is sometimes right."""
    return len(prediction) % 2 == 1


def double(text: str) -> str:
    """The answers of the second task."""
    return text * 2


def backwards(text: str) -> str:
    """The answers of the third task."""
    return text[::-1]


WORDS = tv.Task("upper", tuple(f"{a}{b}" for a in "abcdefgh" for b in "uvwx"), str.upper, odd, category="letters")
# The other task of "upper" is "double"; that of "double" is one of the others.
TASKS = (
    WORDS,
    replace(WORDS, name="double", answer=double, category="words"),
    replace(WORDS, name="reverse", answer=backwards),
)
OPTIONS: dict[str, Any] = {
    "shots": 2,
    "n_train": 2,
    "n_dev": 2,
    "n_test": 3,
    "max_new_tokens": 1,
    "strengths": (1.0,),
    "layers": (2,),
    "controls": (tv.OtherTask(),),
    "conditions": (),
    "seeds": (0, 4),
}


@dataclass(frozen=True)
class Watched(tv.Method):
    """Mean states. Each call adds the task, the seed and the process to the file `calls` in a folder; if the folder has
    a file "fail TASK", the call for that task fails, and a file "kill TASK" is removed and ends the process.
    """

    name: ClassVar[str] = "watched"
    folder: str = ""

    def __call__(self, engine: tv.Engine, task: tv.Task, prompts: Sequence[tv.Prompt], seed: int) -> tv.TaskVectors:
        """The mean states."""
        if self.folder:
            watched = Path(self.folder)
            with open(watched / "calls", "a") as file:
                file.write(f"{task.name} {seed} {os.getpid()}\n")
            if (watched / f"kill {task.name}").exists():
                (watched / f"kill {task.name}").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            if (watched / f"fail {task.name}").exists():
                raise ArithmeticError(f"no luck with {task.name}")
        return tv.MeanState()(engine, task, prompts, seed)


def methods(watched: Path | str = "") -> dict[str, tv.Method]:
    """Two methods, the first of them watched."""
    return {"watched": Watched(str(watched)), "extract": tv.Extraction(substitutes=1)}
