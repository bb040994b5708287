"""Run a `RemoteBridge`: a model that another process or library runs, and that takes no Python hooks.

Layer `l` is the output of block `l`, `blocks.l.hook_out`. An edit is sent as data, `{"op": "set", "value": vector,
"pos": position}`, and no cache comes back: a row is sent whole for each new token, with its edits at the same
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import RemoteBridge

from tv_lens.edits import ATTN_OUT, MLP_OUT, RESID_POST, Edit, Edits, Site
from tv_lens.engines.base import Capability, Pass, StatelessEngine, Tokens
from tv_lens.engines.bridge import BridgeCodec, check_batch_size, info_of
from tv_lens.engines.drivers import remote_facts
from tv_lens.engines.hooks import weighted
from tv_lens.engines.planning import Limits
from tv_lens.errors import EngineError, UnsupportedError

_NO_READOUT = (
    "runs where its unembedding cannot be reached; boot the model with TransformerBridge.boot_transformers to see "
    "which tokens its vectors point to"
)
_BOOT_TO_PATCH = "boot it with RemoteBridge.boot_vllm(name, enable_position_interventions=True), or boot_inspect(name)"
_CAPABILITIES = {Capability.PATCH, Capability.ADD, Capability.POSITIONS, Capability.CONTINUE}


class RemoteEngine(StatelessEngine):
    """A `RemoteBridge`: `boot_vllm` for models that outgrow one GPU, `boot_inspect` for Inspect's providers.

    Rows are sent one at a time, or `batch_size` together to a vLLM booted with `enable_batching=True`, which reads and
    generates in batches and cannot patch. Patching in vLLM takes `enable_position_interventions=True`.
    `prepend_bos=None` follows the model's configuration. `progress=False` turns progress bars off.

    Raises:
        UnsupportedError: not a `RemoteBridge`, or not a decoder-only model.
        TvLensError: no tokenizer, or no BOS token to prepend.

    Examples:
        >>> from transformer_lens.model_bridge import RemoteBridge
        >>> engine = tv.RemoteEngine(RemoteBridge.boot_inspect("gpt2"))  # doctest: +SKIP
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
            raise UnsupportedError(
                f"RemoteEngine runs a RemoteBridge, not a {type(bridge).__name__}; boot one with "
                "RemoteBridge.boot_vllm(name, enable_position_interventions=True) or boot_inspect(name)"
            )
        self.bridge, self.batch_size, self.progress = bridge, check_batch_size(batch_size), progress
        self._facts = remote_facts(bridge)
        self._hooks = _hooks_of(bridge)
        self.info = info_of(
            bridge,
            n_ctx=self._facts.n_ctx,
            end_ids=self._facts.end_ids,
            prepend_bos=prepend_bos,
            hooks=self._hooks.get(RESID_POST, {}),
        )
        self.text = BridgeCodec(bridge, self.info)
        self.sites = frozenset(self._hooks)
        self.capabilities = frozenset(_CAPABILITIES)
        self.reasons = {Capability.READOUT: _NO_READOUT}
        if self._facts.cannot_patch:
            self.capabilities -= {Capability.PATCH, Capability.ADD}
            reason = f"{self._facts.cannot_patch}, so no vector can be written into a prompt; {_BOOT_TO_PATCH}"
            self.reasons |= {Capability.PATCH: reason, Capability.ADD: reason}

    @property
    def limits(self) -> Limits:
        """One row at a time, unless the remote side runs batches; rows are sent without pads."""
        batch_size = self.batch_size if self._facts.batches else self.batch_size or 1
        return Limits(d_vocab=self.info.d_vocab, batch_size=batch_size)

    def layers_of(self, site: Site) -> tuple[int, ...]:
        """The layers that have the site."""
        self.require_site(site)
        return tuple(self._hooks[site])

    def run(
        self,
        tokens: Tokens,
        *,
        edits: Edits,
        read: Sequence[Site],
        weights: Float[Tensor, "batch *sum window"] | None,
        logits: bool | int,
        grad: bool,
    ) -> Pass:
        """Send whole rows, with all edits made in them so far."""
        self.require_plain(logits=logits, grad=grad)
        tokens.check_positions(edits)
        rows = tokens.rows()
        together = self._facts.batches and not edits
        batches = [list(range(len(rows)))] if together else [[row] for row in range(len(rows))]
        passes = [self._send([rows[i] for i in batch], edits.keep(batch), read, logits) for batch in batches]
        last = [each for outputs, _ in passes for each in outputs]
        reads = [each for _, captured in passes for each in captured]
        return Pass(
            logits=torch.stack(last) if logits else None,
            reads={site: self._stacked(site, reads, weights) for site in read},
        )

    def _send(
        self, rows: list[list[int]], edits: Edits, read: Sequence[Site], logits: bool | int
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Next-token logits of each row, and what was captured of it, unpadded."""
        intervene = self._specs(edits, len(rows[0])) if edits else {}
        ids = rows if self._facts.batches else torch.tensor(rows, device="cpu")
        if not read:
            output = self.bridge.forward(ids, intervene=intervene)
            return [output[i, len(row) - 1].float().cpu() for i, row in enumerate(rows)], []
        wanted = [name for site in read for name in self._hooks[site].values()]
        output, cache = self.bridge.run_with_cache(
            ids, names_filter=wanted, return_cache_object=False, return_logits=bool(logits), intervene=intervene
        )
        missing = set(wanted) - set(cache)
        if missing:
            raise EngineError(f"{self.name} gave no read of {sorted(missing)}")
        # A batch comes back padded on the right.
        captured = [{name: cache[name][i, : len(row)].float().cpu() for name in wanted} for i, row in enumerate(rows)]
        last = [output[i, len(row) - 1].float().cpu() for i, row in enumerate(rows)] if logits else []
        return last, captured

    def _stacked(
        self, site: Site, rows: Sequence[dict[str, Tensor]], weights: Float[Tensor, "batch *sum window"] | None
    ) -> Float[Tensor, "batch layer *sum width"]:
        stacked = []
        for i, captured in enumerate(rows):
            layers = torch.stack([captured[name] for name in self._hooks[site].values()])  # layer pos width
            stacked.append(weighted(layers, None if weights is None else weights[i]))
        return torch.stack(stacked)

    def _specs(self, edits: Edits, length: int) -> dict[str, dict[str, Any]]:
        """The edits of one row as TransformerLens's intervention specs: one per hook."""
        by_hook: dict[str, list[Edit]] = {}
        for edit in edits:
            self.require_site(edit.site)
            for used, needed in (
                (edit.keep_norm, Capability.KEEP_NORM),
                (edit.op == "rotate", Capability.ROTATE),
                (edit.linear is not None, Capability.LINEAR),
            ):
                if used:
                    self.require(needed)
            by_hook.setdefault(self._hooks[edit.site][edit.layer], []).append(edit)
        return {name: self._spec(name, some, length) for name, some in by_hook.items()}

    def _spec(self, name: str, edits: Sequence[Edit], length: int) -> dict[str, Any]:
        ops = {edit.op for edit in edits}
        positions = [length + edit.position for edit in edits]
        if len(ops) > 1 or len(set(positions)) < len(positions):
            raise UnsupportedError(
                f"{name} is to be written to in several ways at once, and {self.name} takes one for each hook; add the "
                "vectors up, or use a local model"
            )
        values = [edit.value[0] for edit in edits]
        if all(torch.equal(value, values[0]) for value in values):
            value = values[0].tolist()
        elif self._facts.values_per_position:
            value = torch.stack(values).tolist()
        else:
            raise UnsupportedError(
                f"{name} is to get different vectors at different positions, and {self.name} takes one vector for "
                "each hook"
            )
        return {"op": ops.pop(), "value": value, "pos": positions if len(positions) > 1 else positions[0]}


def _hooks_of(bridge: RemoteBridge) -> dict[Site, dict[int, str]]:
    """For each site that can be read, the hook of every layer."""
    present = bridge.hook_dict
    hooks = {}
    for site in (RESID_POST, ATTN_OUT, MLP_OUT):
        names = {layer: str(site.remote_hook).format(layer=layer) for layer in range(int(bridge.cfg.n_layers))}
        named = {layer: name for layer, name in names.items() if name in present}
        if named:
            hooks[site] = named
    return hooks
