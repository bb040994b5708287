"""Demonstrations of one task, the vector of another (Hendel et al. 2023, section 5): which does the model follow?

python examples/conflict.py [task] [rival]
"""

import sys

import tv_lens as tv


def main(name: str = "present_to_past", rival_name: str = "present_to_gerund") -> None:
    model, library = tv.demo_model(), tv.library()
    task, rival = library[name], library[rival_name]

    # The rival's vector and its layer, from verbs that are not asked below.
    dev, test = rival.split(0.5, seed=0)
    prompts = dev.sample(10, shots=5, seed=0, template=tv.PAPER)
    vector = tv.extract(model, prompts, dev.substitutes(prompts, 2, seed=0)).mean()
    layer = tv.sweep_layers(model, dev, prompts, vector).best

    sampled = task.sample(len(task), shots=5, seed=0, template=tv.PAPER)
    asked = [prompt for prompt in sampled if prompt.query in test.inputs]
    clash = tv.conflict(model, task, rival, asked[:20], vector, layer)
    print(f"demonstrations of {name}, vector of {rival_name} at layer {layer}\n")
    print(clash.to_pandas().round(2).to_string(index=False), "\n")
    for prompt, plain, patched in list(zip(asked, clash.plain_task.texts, clash.patched_task.texts, strict=False))[:6]:
        print(f"{prompt.query:>12} -> {plain:<14} patched {patched}")


if __name__ == "__main__":
    main(*sys.argv[1:])
