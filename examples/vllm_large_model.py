"""A model that outgrows one GPU: vLLM runs it, tensor and pipeline parallel, and tv_lens reads and patches.

pip install "tv_lens[vllm]"    (Linux, CUDA; the GPUs of one machine)
python examples/vllm_large_model.py meta-llama/Llama-3.1-70B [GPUs a layer is split over] [stages of layers]
"""

import sys

import torch
from transformer_lens.model_bridge import RemoteBridge

import tv_lens as tv


def main(name: str, tensor_parallel: str = "4", pipeline_parallel: str = "1", tokens: str = "1024") -> None:
    boot = {
        "dtype": torch.bfloat16,
        "tensor_parallel_size": int(tensor_parallel),
        "pipeline_parallel_size": int(pipeline_parallel),
        "gpu_memory_utilization": 0.85,
        # The longest prompt, and what the capture buffers are sized for: keep it small.
        "max_model_len": int(tokens),
        "max_num_batched_tokens": int(tokens),
        # Without this, vectors can be read and not written; tv_lens says so before it runs anything.
        "enable_position_interventions": True,
    }
    task = tv.library()["present_to_past"]
    dev, test = task.split(0.5, seed=0)
    prompts = dev.sample(min(20, len(dev)), shots=5, seed=0, template=tv.PAPER)
    with RemoteBridge.boot_vllm(name, **boot) as model:
        vector = tv.extract(model, prompts, dev.substitutes(prompts, 2, seed=0)).mean()
        # Every patched row is a separate run: sweep every fourth layer and the first token, then look closer.
        coarse = tv.sweep_layers(model, dev, prompts, vector, range(0, vector.n_layers, 4), max_new_tokens=1)
        near = [layer for layer in range(coarse.best - 3, coarse.best + 4) if 0 <= layer < vector.n_layers]
        best = tv.sweep_layers(model, dev, prompts, vector, near, max_new_tokens=1).best
        held_out = test.sample(min(20, len(test)), shots=0, seed=1, template=tv.PAPER)
        answers = tv.patch_generate(model, held_out, vector, best, max_new_tokens=6)
        print(f"{name}, {task.name}, patched at layer {best}: {tv.score(test, held_out, answers)}")
        for prompt, answer in list(zip(held_out, answers, strict=True))[:8]:
            print(f"{prompt.query:>12} -> {answer:<16} expected {prompt.answer}")


if __name__ == "__main__":
    main(*sys.argv[1:])
