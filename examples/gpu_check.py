"""Does this machine's GPU give what the CPU gives? A table of checks; those that it cannot do are skipped.

python examples/gpu_check.py [model]

Without a model a small random one is made, so that nothing is downloaded. Exits with 1 if a check fails. For all of
the checks: two CUDA GPUs, `pip install accelerate bitsandbytes torchao`, and for GPTQ or AWQ such a model as argument.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as kinds
from tokenizers.trainers import BpeTrainer
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TorchAoConfig,
)

import tv_lens as tv

TASK = tv.Task("upper", ("hot", "cold", "big", "small", "tall", "wet", "dry", "old", "new", "far"), str.upper)
PROMPTS = TASK.sample(8, shots=3, seed=0)
SUBSTITUTES = TASK.substitutes(PROMPTS, 2, seed=0)

# How far a result may be from float32 on the CPU, as a share of its length: rounding over all layers.
TOLERANCES = {torch.float32: 2e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
QUANTIZED = 0.4  # that reads and writes work, not that four bits are enough


class Skipped(Exception):  # noqa: N818 - it is not an error
    """A check that this machine cannot do; the text says what it needs."""


def random_model(folder: str) -> str:
    """A folder with a random model of 4 layers and its tokenizer."""
    torch.manual_seed(0)
    inner = Tokenizer(kinds.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    specials = ["<s>", "</s>", "<pad>"]
    inner.train_from_iterator(
        [prompt.text for prompt in PROMPTS],
        BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    model.save_pretrained(folder)
    return folder


class Checks:
    """The checks, for one model; each returns what it measured."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.config = AutoConfig.from_pretrained(name)
        self.is_quantized = "quantization_config" in self.config.to_dict()
        self.expected: torch.Tensor | None = None if self.is_quantized else self.results(self.boot(device="cpu"))

    def boot(self, **options: Any) -> TransformerBridge:
        return TransformerBridge.boot_transformers(self.name, **options)

    def loaded(self, **options: Any) -> TransformerBridge:
        """A bridge around a model that transformers has loaded."""
        model = AutoModelForCausalLM.from_pretrained(self.name, **options)
        return TransformerBridge.boot_transformers(self.name, hf_model=model)

    def results(self, model: TransformerBridge) -> torch.Tensor:
        """Vectors, and logits of patched prompts, as one tensor."""
        engine = tv.LocalEngine(model, progress=False)
        vectors = tv.extract(engine, PROMPTS, SUBSTITUTES)
        logits = tv.patched_logits(engine, PROMPTS, vectors, engine.n_layers // 2)
        tv.patch_generate(engine, PROMPTS, vectors, 1, max_new_tokens=3)
        return torch.cat([vectors.values.flatten(1), logits], dim=1)

    def near(self, model: TransformerBridge, tolerance: float) -> str:
        actual = self.results(model)
        assert bool(actual.isfinite().all()), "NaN or infinite"
        if self.expected is None:
            return "finite (no unquantized model to compare with)"
        distance = float((actual - self.expected).norm() / self.expected.norm())
        assert distance <= tolerance, f"{distance:.4f} from float32 on the CPU, more than {tolerance}"
        return f"{distance:.4f} from float32 on the CPU"

    # The checks, in the order of the table.

    def dtype(self, dtype: torch.dtype) -> str:
        needs(cuda(1), "a CUDA GPU")
        model = self.boot(device="cuda", dtype=dtype)
        assert tv.LocalEngine(model).info.dtype == str(dtype).removeprefix("torch.")
        return self.near(model, TOLERANCES[dtype])

    def float32(self) -> str:
        return self.dtype(torch.float32)

    def float16(self) -> str:
        return self.dtype(torch.float16)

    def bfloat16(self) -> str:
        return self.dtype(torch.bfloat16)

    def two_gpus(self) -> str:
        needs(cuda(2), "two CUDA GPUs")
        needs(installed("accelerate"), "accelerate")
        model = self.boot(device_map="balanced")
        assert int(model.cfg.n_devices) == 2, f"the model is on {model.cfg.n_devices} device(s)"
        return self.near(model, TOLERANCES[torch.float32])

    def offloaded(self) -> str:
        needs(installed("accelerate"), "accelerate")
        with tempfile.TemporaryDirectory() as folder:
            n_layers = int(self.config.get_text_config().num_hidden_layers)
            model = self.boot(device="cpu")
            names = dict(model.original_model.named_modules())
            needs("model.layers.0" in names and "lm_head" in names, "a model with model.layers and lm_head")
            places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
            places |= {f"model.layers.{layer}": "cpu" if layer % 2 else "disk" for layer in range(n_layers)}
            return self.near(self.boot(device_map=places, offload_folder=folder), TOLERANCES[torch.float32])

    def out_of_memory(self) -> str:
        """The GPU has a third of what 512 rows need, and the engine does not know."""
        needs(cuda(1), "a CUDA GPU")
        model = self.boot(device="cuda")
        prompts = [tv.Prompt((), "hot cold big small " * 8)] * 512
        few = tv.generate(tv.LocalEngine(model, batch_size=8, progress=False), prompts[:8], max_new_tokens=2)
        torch.cuda.reset_peak_memory_stats()
        tv.generate(tv.LocalEngine(model, batch_size=512, progress=False), prompts, max_new_tokens=2)
        used = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction((total - free + used // 3) / total)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                many = tv.generate(tv.LocalEngine(model, batch_size=512, progress=False), prompts, max_new_tokens=2)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert any("no memory for" in str(each.message) for each in caught), "memory did not run out"
        assert set(many.texts) == set(few.texts), "other answers than with ample memory"
        return str(next(each.message for each in caught if "no memory for" in str(each.message))).split(";")[0]

    def budget(self) -> str:
        needs(cuda(1), "a CUDA GPU")
        model, memory = self.boot(device="cuda"), 64 * 2**20
        engine = tv.LocalEngine(model, memory=memory, progress=False)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        tv.generate(engine, TASK.sample(300, shots=3, seed=1), max_new_tokens=4)
        used = torch.cuda.max_memory_allocated() - before
        assert used <= memory, f"{used / 2**20:.0f} MB used of {memory / 2**20:.0f} MB"
        return f"{used / 2**20:.0f} MB used of {memory / 2**20:.0f} MB"

    def bitsandbytes(self, **options: Any) -> str:
        needs(cuda(1), "a CUDA GPU")
        needs(installed("bitsandbytes"), "bitsandbytes")
        needs(not self.is_quantized, "a model that is not quantized")
        model = self.loaded(quantization_config=BitsAndBytesConfig(**options), device_map={"": 0})  # type: ignore[no-untyped-call]
        return f"{self.near(model, QUANTIZED)}; {self.trained(model)}"

    def bitsandbytes_8(self) -> str:
        return self.bitsandbytes(load_in_8bit=True)

    def bitsandbytes_4(self) -> str:
        return self.bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16)

    def torchao_int8(self) -> str:
        needs(installed("torchao"), "torchao")
        needs(not self.is_quantized, "a model that is not quantized")
        from torchao.quantization import Int8WeightOnlyConfig

        device = "cuda:0" if cuda(1) else "cpu"
        model = self.loaded(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), device_map={"": device})
        return f"{self.near(model, QUANTIZED)}; {self.trained(model)}"

    def quantized_checkpoint(self) -> str:
        """GPTQ, AWQ, FP8, ...: whatever the model named on the command line is."""
        needs(self.is_quantized, "a quantized model (GPTQ, AWQ, ...) as argument")
        model = self.loaded(device_map="auto")
        kind = self.config.to_dict()["quantization_config"].get("quant_method")
        return f"{kind}: {self.near(model, QUANTIZED)}; {self.trained(model)}"

    def trained(self, model: TransformerBridge) -> str:
        """Vectors are trained, or refused if the quantized weights have no backward pass."""
        try:
            tv.learn(tv.LocalEngine(model, progress=False), PROMPTS, layers=0, epochs=1)
        except tv.UnsupportedError as error:
            return f"no training ({str(error).split(';')[0]:.60})"
        return "trains"

    def speed(self) -> str:
        """A sweep in batches against the same sweep row by row."""
        needs(cuda(1), "a CUDA GPU")
        model = self.boot(device="cuda")
        vectors = tv.extract(model, PROMPTS, SUBSTITUTES)
        seconds = []
        for batch_size in (None, 1):
            engine = tv.LocalEngine(model, batch_size=batch_size, progress=False)
            tv.generate(engine, PROMPTS[:1], max_new_tokens=1)
            torch.cuda.synchronize()
            start = time.perf_counter()
            tv.sweep_layers(engine, TASK, PROMPTS, vectors, max_new_tokens=3)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        assert seconds[0] < seconds[1], f"{seconds[0]:.2f} s in batches, {seconds[1]:.2f} s row by row"
        return f"{seconds[1] / seconds[0]:.1f} times as fast as row by row ({seconds[0]:.2f} s)"


def needs(is_there: bool, what: str) -> None:
    if not is_there:
        raise Skipped(f"needs {what}")


def cuda(count: int) -> bool:
    return torch.cuda.is_available() and torch.cuda.device_count() >= count


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def outcome(check: Callable[[], str]) -> tuple[str, str]:
    """pass, FAIL or skipped, and what was measured or why."""
    try:
        return "pass", check()
    except Skipped as reason:
        return "skipped", str(reason)
    except AssertionError as error:
        return "FAIL", str(error)
    except Exception as error:  # a table of all checks is worth more than the first traceback
        traceback.print_exc()
        return "FAIL", f"{type(error).__name__}: {error}".splitlines()[0][:150]
    finally:
        with suppress(RuntimeError, AssertionError):
            torch.cuda.empty_cache()


def main(name: str | None = None) -> int:
    with tempfile.TemporaryDirectory() as folder:
        checks = Checks(name or random_model(folder))
        table = {
            "float32": checks.float32,
            "float16": checks.float16,
            "bfloat16": checks.bfloat16,
            "device_map over two GPUs": checks.two_gpus,
            "device_map with layers on disk": checks.offloaded,
            "out of memory, smaller passes": checks.out_of_memory,
            "memory= is kept": checks.budget,
            "bitsandbytes 8 bit": checks.bitsandbytes_8,
            "bitsandbytes 4 bit": checks.bitsandbytes_4,
            "torchao int8 weights": checks.torchao_int8,
            "a quantized checkpoint": checks.quantized_checkpoint,
            "faster than a loop": checks.speed,
        }
        failed = 0
        for title, check in table.items():
            result, detail = outcome(check)
            failed += result == "FAIL"
            print(f"{title:<32} {result:<8} {detail}", flush=True)
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
