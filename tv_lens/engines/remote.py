"""Run a `RemoteBridge`: a model that another process or library runs, which takes no Python hooks.

Layer `l` is the output of block `l`, `blocks.l.hook_out`. A patch goes along as data, `{"op": "set", "value": vector,
"pos": position}`, and no cache comes back: a row is sent whole for each new token, with its patch at the same position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import RemoteBridge
from transformer_lens.model_bridge.sources.inspect.driver import InspectDriver
from transformer_lens.model_bridge.sources.vllm.driver import VLLMDriver

from tv_lens.engines.bridge import BridgeEngine
from tv_lens.engines.contract import Past, Patch, Replay, Tokens


class RemoteEngine(BridgeEngine):
    """A `RemoteBridge`: `boot_vllm` for models that outgrow one GPU, `boot_inspect` for Inspect's providers.

    Rows are sent one at a time, or `batch_size` together to a vLLM booted with `enable_batching=True`, which reads
    and generates in batches and cannot patch. Patching in vLLM takes `enable_position_interventions=True`.
    `prepend_bos` follows the model where it is None. `progress=False` turns progress bars off.

    Raises:
        TypeError: not a `RemoteBridge`.
        ValueError: the model has no decoder-only stack of blocks, no tokenizer, or no BOS token to prepend.
    """

    def __init__(
        self,
        bridge: RemoteBridge,
        *,
        batch_size: int | None = None,
        prepend_bos: bool | None = None,
        progress: bool = True,
    ) -> None:
        if not isinstance(bridge, RemoteBridge):
            raise TypeError(
                f"RemoteEngine runs a RemoteBridge, not a {type(bridge).__name__}; boot one with "
                "RemoteBridge.boot_vllm(name, enable_position_interventions=True) or boot_inspect(name)"
            )
        # A bridge does not tell what it was booted with; its driver knows.
        driver = bridge._driver
        n_ctx, ends, self._together, self._no_patch = int(bridge.cfg.n_ctx), None, False, ""
        if isinstance(driver, VLLMDriver):
            config = driver._llm.llm_engine.model_config
            ends = config.try_get_generation_config().get("eos_token_id")
            n_ctx = min(n_ctx, config.max_model_len - 1)  # vLLM wants room for a token of its own
            self._together = driver._enable_batching
            if not self._together:
                n_ctx = min(n_ctx, driver._max_num_batched_tokens)
            if not driver._enable_position_interventions:
                self._no_patch = "was booted without enable_position_interventions=True"
        elif isinstance(driver, InspectDriver):
            # Of Inspect's providers only TransformerLens's own, which holds the model itself, edits at a position.
            model = getattr(driver._model.api, "_hf", None)
            ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
            if model is None:
                self._no_patch = "is run by an Inspect provider that cannot write at one position"
        super().__init__(
            bridge,
            "blocks.{layer}.hook_out",
            n_ctx=n_ctx,
            ends=ends,
            batch_size=batch_size,
            prepend_bos=prepend_bos,
            progress=progress,
        )

    def check_patching(self) -> None:
        """Nothing, where vectors can be written into this model.

        Raises:
            ValueError: the bridge was booted without what that needs.
        """
        if self._no_patch:
            raise ValueError(
                f"{self.name} {self._no_patch}, so no vector can be written into a prompt's last position; boot it "
                "with RemoteBridge.boot_vllm(name, enable_position_interventions=True), or boot_inspect(name)"
            )

    def read(self, tokens: Tokens, past: Past = None) -> Float[Tensor, "batch layer d_model"]:
        """The residual stream after each block at the last position; float32 on the CPU."""
        reads = []
        for ids, edits in self._parts(Replay.after(past, tokens)):
            _, cache = self.bridge.run_with_cache(
                self._sent(ids),
                names_filter=self._hooks,
                return_cache_object=False,
                return_logits=False,
                intervene=edits,
            )
            missing = set(self._hooks) - set(cache)
            if missing:
                raise RuntimeError(f"{self.name} gave no read of {sorted(missing)}")
            for i, row in enumerate(ids):  # a batch comes back padded on the right
                reads.append(torch.stack([cache[name][i, len(row) - 1].float().cpu() for name in self._hooks]))
        return torch.stack(reads)

    def step(
        self, tokens: Tokens, patch: Patch | None = None, past: Past = None
    ) -> tuple[Float[Tensor, "batch d_vocab"], Past]:
        """Next-token logits (float32, on the CPU) after the last position, with `patch` written there, and the rows
        so far with their patches, to be sent again with the next token.
        """
        if patch is not None:
            self.check_patching()
        past = Replay.after(past, tokens, patch)
        logits = []
        for ids, edits in self._parts(past):
            found = self.bridge.forward(self._sent(ids), intervene=edits)
            logits += [found[i, len(row) - 1].float().cpu() for i, row in enumerate(ids)]
        return torch.stack(logits), past

    def fork(self, past: Past, copies: int = 1) -> Past:
        """An independent past with each row `copies` times in a row."""
        return past.copies(copies)

    def select(self, past: Past, rows: Sequence[int]) -> Past:
        """The past of only these rows."""
        return past.keep(rows)

    # Inside

    def _rows(self, longest: int) -> int:
        return super()._rows(longest) if self._together else self.batch_size or 1

    def _parts(self, replay: Replay) -> list[tuple[list[list[int]], dict[str, dict[str, Any]]]]:
        """What to send at once: rows without their pads, and what to write where in them."""
        rows = [ids[seen.bool()].tolist() for ids, seen in zip(replay.tokens.ids, replay.tokens.mask, strict=True)]
        if self._together and not replay.edits:
            return [(rows, {})]
        return [([row], self._edits(replay, i)) for i, row in enumerate(rows)]

    def _edits(self, replay: Replay, row: int) -> dict[str, dict[str, Any]]:
        edits: dict[str, dict[str, Any]] = {}
        for at, patch in replay.edits:
            name = self._hooks[int(patch.layers[row])]
            if name in edits:
                raise ValueError(f"{name} is to be written at two positions of a row; {self.name} takes one a layer")
            position = int(replay.tokens.mask[row, :at].sum())  # pads are not sent
            edits[name] = {"op": "set", "value": patch.vectors[row].tolist(), "pos": position}
        return edits

    def _sent(self, ids: list[list[int]]) -> list[list[int]] | Tensor:
        return ids if self._together else torch.tensor(ids)
