"""Corrupted prompts: the same demonstrations with permuted outputs, or none."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from tv_lens.errors import TvLensError
from tv_lens.prompts import Example, Prompt


def shuffle_outputs(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """The prompts with the outputs of their demonstrations permuted, so that no demonstration keeps its own and as few
    as possible are still correct. (If most outputs are equal, some will be.)

    Args:
        prompts: prompts with two demonstrations or more.
        seed: the same seed gives the same result.

    Returns:
        Prompts with the same queries and answers.

    Raises:
        TvLensError: a prompt with fewer than two demonstrations.

    Examples:
        >>> [prompt] = tv.Task.from_mapping("pairs", {"a": "1", "b": "2", "c": "3"}).sample(1, shots=2, seed=0)
        >>> [shuffled] = shuffle_outputs([prompt], seed=0)
        >>> [each.output for each in shuffled.examples] == [each.output for each in reversed(prompt.examples)]
        True
    """
    draw = random.Random(f"shuffle outputs:{seed}")
    mixed = []
    for i, prompt in enumerate(prompts):
        if prompt.shots < 2:
            raise TvLensError(f"prompt {i} has {prompt.shots} demonstrations; outputs are permuted among 2 or more")
        order = draw.sample(range(prompt.shots), prompt.shots)
        outputs = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle through all
        if any(prompt.examples[j].output == prompt.examples[k].output for j, k in outputs.items()):
            outputs = _fewest_correct([example.output for example in prompt.examples], order)
        examples = [Example(each.input, prompt.examples[outputs[j]].output) for j, each in enumerate(prompt.examples)]
        mixed.append(replace(prompt, examples=tuple(examples)))
    return mixed


def shuffle_answers(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """The prompts with their answers permuted among them, so that no prompt keeps its own and as few as possible are
    still correct: labels without a task, for a method that learns from answers.

    Args:
        prompts: two prompts or more, with answers.
        seed: the same seed gives the same result.

    Returns:
        Prompts with the same demonstrations and queries.

    Raises:
        TvLensError: fewer than two prompts, or a prompt without an answer.

    Examples:
        >>> shuffled = shuffle_answers(prompts, seed=0)
        >>> sorted(each.answer for each in shuffled) == sorted(each.answer for each in prompts)
        True
    """
    answers = [prompt.answer for prompt in prompts]
    if len(answers) < 2 or None in answers:
        raise TvLensError(f"{len(answers)} prompts, {answers.count(None)} of them without an answer, to permute")
    known = [answer for answer in answers if answer is not None]
    order = random.Random(f"shuffle answers:{seed}").sample(range(len(known)), len(known))
    chosen = _fewest_correct(known, order)
    return [replace(prompt, answer=known[chosen[i]]) for i, prompt in enumerate(prompts)]


def swap_demonstrations(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """The prompts with input and output swapped in a random half of the different demonstrations, in every prompt that
    shows one of them. A demonstration and its inverse are swapped together, so that as many different ones remain.

    Raises:
        TvLensError: prompts with fewer than two demonstrations in all.
    """
    pairs = list(dict.fromkeys(frozenset(each) for prompt in prompts for each in prompt.examples))
    if len(pairs) < 2:
        raise TvLensError(f"the prompts show {len(pairs)} different demonstrations; half of 2 or more are swapped")
    swapped = set(random.Random(f"swap demonstrations:{seed}").sample(pairs, len(pairs) // 2))
    return [
        replace(
            prompt,
            examples=tuple(
                Example(each.output, each.input) if frozenset(each) in swapped else each for each in prompt.examples
            ),
        )
        for prompt in prompts
    ]


def pair_within_sides(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """The prompts with demonstrations that no longer lead from inputs to outputs: a random half of the different ones
    get each other's inputs as outputs, the others each other's outputs as inputs. Every text is read as often on either
    side, so their mean difference is zero, and what remains is how texts of one side differ.

    Raises:
        TvLensError: prompts with fewer than four demonstrations in all.
    """
    shown = list(dict.fromkeys(example for prompt in prompts for example in prompt.examples))
    if len(shown) < 4:
        raise TvLensError(f"the prompts show {len(shown)} different demonstrations; 4 or more are paired anew")
    order = random.Random(f"pair within sides:{seed}").sample(shown, len(shown))
    half = len(order) // 2
    inputs, outputs = order[:half], order[half:]
    paired = {each: Example(each.input, inputs[i - 1].input) for i, each in enumerate(inputs)}
    paired |= {each: Example(each.output, outputs[i - 1].output) for i, each in enumerate(outputs)}
    return [replace(prompt, examples=tuple(paired[each] for each in prompt.examples)) for prompt in prompts]


def without_demonstrations(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """The queries alone, as another kind of corruption.

    Args:
        prompts: few-shot prompts.
        seed: changes nothing.

    Returns:
        Prompts without demonstrations.

    Examples:
        >>> {prompt.shots for prompt in without_demonstrations(prompts, seed=0)}
        {0}
    """
    return [prompt.zero_shot() for prompt in prompts]


def _fewest_correct(outputs: Sequence[str], order: Sequence[int]) -> dict[int, int]:
    """The assignment of outputs with the fewest correct pairs and, among these, the fewest fixed points; `order` breaks
    ties.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    n = len(outputs)
    cost = np.array([[(outputs[j] == outputs[k]) + (j == k) / (n + 1) for k in order] for j in order])
    rows, columns = linear_sum_assignment(cost)
    return {order[row]: order[column] for row, column in zip(rows.tolist(), columns.tolist(), strict=True)}
