"""Read a task vector, find its layer, write it back: tv_lens on a pretrained model, in about a minute."""

import tv_lens as tv

# Everyday verbs, each one token in this model's vocabulary, and so is its gerund.
VERBS = """go:going make:making take:taking come:coming see:seeing get:getting give:giving find:finding think:thinking
tell:telling keep:keeping hold:holding write:writing stand:standing set:setting run:running pay:paying lead:leading
read:reading grow:growing build:building break:breaking cut:cutting drive:driving catch:catching win:winning fly:flying
eat:eating sell:selling fight:fighting use:using work:working play:playing move:moving live:living learn:learning
change:changing watch:watching follow:following create:creating open:opening walk:walking reach:reaching raise:raising
report:reporting look:looking start:starting love:loving save:saving share:sharing kill:killing train:training
test:testing add:adding cover:covering close:closing print:printing load:loading fill:filling"""


def main() -> None:
    model = tv.demo_model()
    gerunds = dict(pair.split(":") for pair in VERBS.split())
    task = tv.Task.from_mapping("gerund", gerunds, accepts=tv.starts_with)
    dev, test = task.split(0.5, seed=3)  # no verb is in both
    paper = tv.Template("example:{input}->{output}")

    # Read: a vector for each prompt and layer, then their mean, the task's.
    prompts = dev.sample(20, shots=5, seed=3, template=paper)
    vector = tv.extract(model, prompts, dev.substitutes(prompts, 2, seed=3)).mean()

    # Find the layer: patch the queries alone, at every layer.
    sweep = tv.sweep_layers(model, dev, prompts, vector)
    print(f"{model.cfg.model_name}, task {task.name!r}, 20 prompts of 5 shots; accuracy [95% interval]")
    print("zero-shot          ", tv.score(dev, prompts, tv.generate(model, [p.zero_shot() for p in prompts])))
    print("few-shot           ", tv.score(dev, prompts, tv.generate(model, prompts)))
    print(f"patched at layer {sweep.best:2d}", "", sweep.at(sweep.best), "\n\naccuracy by layer")
    for layer, result in zip(sweep.layers, sweep.scores, strict=True):
        print(f"{layer:5d}  {result.accuracy:.2f}  {'#' * round(40 * result.accuracy)}")

    # Write back: with it, verbs that were in no prompt come out as gerunds, without a demonstration.
    held_out = test.sample(20, shots=0, seed=1, template=paper)
    answers = tv.patch_generate(model, held_out, vector, sweep.best)
    print(f"\nheld-out verbs, patched at layer {sweep.best}:", tv.score(test, held_out, answers))
    for prompt, answer in list(zip(held_out, answers, strict=True))[:8]:
        print(f"{prompt.text:>18} {answer:<12} expected {prompt.answer}")


if __name__ == "__main__":
    main()
