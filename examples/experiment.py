"""The paper's main experiment on some of the library's tasks, kept in a folder: an interrupted run resumes.

python examples/experiment.py [folder] [task ...]
"""

import sys
from pathlib import Path

import tv_lens as tv

TASKS = ("present_to_gerund", "antonyms", "singular_to_plural", "to_upper")


def main(folder: str = "results", *names: str) -> None:
    library = tv.library()
    experiment = tv.run_experiment(
        tv.demo_model(), [library[name] for name in names or TASKS], n_dev=20, n_test=30, folder=folder
    )
    print(experiment.summary().to_string(index=False), "\n")
    for result in experiment.results:
        test = result.evaluation
        beaten = [name for name, score in test.controls.items() if tv.mcnemar(test.patched, score) < 0.05]
        print(
            f"{result.task}: patched at layer {test.layer} differs (p < 0.05) from {', '.join(beaten) or 'no control'}"
        )
    experiment.save(Path(folder) / "experiment.json")


if __name__ == "__main__":
    main(*sys.argv[1:])
