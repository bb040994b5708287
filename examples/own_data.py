"""Your own task, from a file of pairs: does it have a task vector, and at which layer?

python examples/own_data.py [pairs.csv or pairs.json] [a model's name or folder]
"""

import sys
from pathlib import Path

from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv


def main(path: str = str(Path(__file__).with_name("comparatives.csv")), name: str | None = None) -> None:
    task = tv.Task.from_file(path, accepts=tv.starts_with)  # or your own rule: (prediction, answer) -> bool
    print(f"{task}, such as {task.inputs[0]} -> {task.answer(task.inputs[0])}")
    model = tv.demo_model() if name is None else TransformerBridge.boot_transformers(name)

    # The layer is chosen on dev, the numbers are from test, and no input is in both.
    dev, test = task.split(0.5, seed=0)
    template = tv.Template("Q: {input}\nA: {output}", separator="\n\n")  # worth trying several
    dev_prompts = dev.sample(min(10, len(dev)), shots=5, seed=0, template=template)
    test_prompts = test.sample(min(20, len(test)), shots=5, seed=0, template=template)
    vector = tv.extract(model, dev_prompts, dev.substitutes(dev_prompts, 2, seed=0)).mean()
    sweep = tv.sweep_layers(model, dev, dev_prompts, vector)
    print(f"best layer on dev: {sweep.best}, {sweep.at(sweep.best)}; tied: {list(sweep.ties)}\n")

    result = tv.evaluate(model, test, test_prompts, vector, sweep.best)
    print(result.to_pandas().round(3).to_string(index=False), "\n")
    print("zero-shot and patched answers:")
    answers = zip(test_prompts, result.zero_shot.texts, result.patched.texts, strict=True)
    for prompt, without, patched in list(answers)[:6]:
        print(f"{prompt.query:>10} -> {without[:24]!r:28} {patched[:24]!r:28} expected {prompt.answer}")


if __name__ == "__main__":
    main(*sys.argv[1:])
