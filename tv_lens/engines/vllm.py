"""Run a model on a vLLM server with the plug-in vllm-lens, many rows at once.

A write into layer `l` at the absolute position `p` is sent as what must be added there:

    residual[l, p] + addition = edit(residual[l, p])

so the row is first run as it is, once for all writes into the same row, and then with the additions. Of several layers
the lower ones come first: what is in a layer depends on the writes below it. The server returns the layers that were
written to, and each is compared with what it should hold.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from tv_lens.edits import Edit, Edits, Site
from tv_lens.engines.base import Capability, Pass, StatelessEngine, Tokens
from tv_lens.engines.bridge import BridgeCodec, info_of
from tv_lens.engines.drivers import described
from tv_lens.engines.hooks import weighted, writer
from tv_lens.engines.planning import Ids, Limits
from tv_lens.engines.running import progress_bar
from tv_lens.engines.text import Stop
from tv_lens.engines.vllm_wire import Addition, Reply, Request, Server
from tv_lens.errors import EngineError, TvLensError
from tv_lens.progress import Bar

Item = TypeVar("Item")
Result = TypeVar("Result")

_CAPABILITIES = frozenset(Capability) - {
    Capability.LOGITS,
    Capability.GRADIENTS,
    Capability.READOUT,
    Capability.PROJECT,
}
_NO_READOUT = (
    "runs on a server, where its unembedding cannot be reached; boot the model with "
    "TransformerBridge.boot_transformers to see which tokens its vectors point to"
)
# Activations of unpatched rows are kept while the rows with writes into them are run: so many numbers at once.
_KEPT_NUMBERS = 2**27


class _WriteError(EngineError):
    """A row in which a write was not made, or was made somewhere else."""


@dataclass(frozen=True, eq=False)
class _Row:
    """A row, and the edits of each layer that is written to, lower layers first."""

    ids: Ids
    edits: Mapping[int, Sequence[Edit]] = field(default_factory=dict)

    @property
    def lowest(self) -> int | None:
        return next(iter(self.edits), None)

    @property
    def is_written_at_start(self) -> bool:
        return any(len(self.ids) + edit.position == 0 for edits in self.edits.values() for edit in edits)

    def then(self, new: Sequence[int]) -> _Row:
        """The row with more tokens, and its edits where they were."""
        moved = {
            layer: [replace(edit, position=edit.position - len(new)) for edit in edits]
            for layer, edits in self.edits.items()
        }
        return _Row(self.ids + tuple(new), moved)


class VLLMEngine(StatelessEngine):
    """A model on a running server: `vllm serve MODEL` with vllm-lens. `vllm_engine` makes one; its options are there.

    Rows are sent separately, up to `server.in_flight` at a time, and the server batches them. `answers` takes all rows
    of a sweep at once. Only the residual stream can be read and written.
    """

    def __init__(
        self,
        server: Server,
        *,
        model: str | None,
        served_as: str | None,
        prepend_bos: bool | None,
        progress: bool,
    ) -> None:
        self.server, self.progress = server, progress
        self.served = server.served(served_as)
        source = model or self.served.source
        try:
            self.bridge, end_ids = described(source)
        except Exception as error:  # of any library on the way, for any reason
            raise TvLensError(
                f"cannot load the configuration and tokenizer of {source!r}: {error}; pass model= with the name or the "
                "folder of the model that the server runs"
            ) from error
        info = info_of(
            self.bridge,
            n_ctx=self.served.longest - 1,  # the server counts the first new token, too
            end_ids=end_ids,
            prepend_bos=prepend_bos,
            hooks={layer: f"blocks.{layer}.hook_out" for layer in range(int(self.bridge.cfg.n_layers))},
        )
        self.text = BridgeCodec(self.bridge, info)
        self.capabilities = _CAPABILITIES
        self.reasons = {Capability.READOUT: _NO_READOUT}
        # Rows without writes may share the server's prefix cache, but not with anybody else's rows.
        self._salt = secrets.token_hex(16)
        self.info = info
        self.info = replace(info, dtype=self._probed_dtype())

    @property
    def limits(self) -> Limits:
        """As many rows as the server has at once; rows are sent without pads."""
        return Limits(d_vocab=self.info.d_vocab, batch_size=self.server.in_flight)

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
        for site in read:
            self.require_site(site)
        layers = tuple(range(self.n_layers)) if read else ()

        rows = tokens.rows()

        def request(row: int) -> Request:
            return Request(tuple(rows[row]), self._salt, layers=layers, logprobs=self.info.d_vocab if logits else 0)

        replies = self._replies(self._rows(rows, edits), request)
        return Pass(
            logits=torch.stack([self._logits(reply) for reply in replies]) if logits else None,
            reads=dict.fromkeys(read, _stacked(replies, weights)) if read else {},
        )

    def answers(
        self, rows: Sequence[Sequence[int]], edits: Edits, *, max_new_tokens: int, stops: Sequence[Stop]
    ) -> list[list[int]]:
        """The most likely continuation of every row."""

        def request(row: int) -> Request:
            stop = Stop(stops[row].text, stops[row].ids | self.info.end_ids)
            return Request(tuple(rows[row]), self._salt, max_new_tokens, stop)

        replies = self._replies(self._rows(rows, edits), request, shown=True)
        self.positions_run += sum(len(row) + len(reply.ids) - 1 for row, reply in zip(rows, replies, strict=True))
        return [reply.ids for reply in replies]

    def close(self) -> None:
        """Close the connections to the server."""
        self.server.close()

    def _probed_dtype(self) -> str:
        """The precision of the server's activations, which are checked to be those of the model."""
        row = tuple(self.text.to_ids("a") or [self.info.pad_id])
        layers = tuple(range(self.n_layers))
        reply = self.server.complete(self.served.name, Request(row, self._salt, layers=layers))
        [width] = {each.shape[1] for each in reply.residuals.values()}
        if width != self.d_model:
            raise EngineError(
                f"the server at {self.server.url} runs a model of width {width}, and {self.name} has {self.d_model}; "
                "pass model= with the name or the folder of the model that the server runs"
            )
        return str(reply.residuals[0].dtype).removeprefix("torch.")

    def _rows(self, rows: Sequence[Sequence[int]], edits: Edits) -> list[_Row]:
        """The rows with their own edits."""
        by_row: list[dict[int, list[Edit]]] = [{} for _ in rows]
        for edit in sorted(edits, key=lambda each: each.layer):
            self.require_site(edit.site)
            for i, number in enumerate(edit.rows.tolist()):
                if -edit.position > len(rows[number]):
                    raise TvLensError(
                        f"row {number} has {len(rows[number])} tokens, so there is none at position {edit.position} to "
                        "write to"
                    )
                one = replace(edit, value=edit.value[i : i + 1], rows=torch.zeros_like(edit.rows[:1]))
                by_row[number].setdefault(edit.layer, []).append(one)
        return [_Row(tuple(ids), own) for ids, own in zip(rows, by_row, strict=True)]

    def _replies(self, rows: Sequence[_Row], request: Callable[[int], Request], *, shown: bool = False) -> list[Reply]:
        """The server's replies to all rows, with the writes checked."""
        replies: dict[int, Reply] = {}
        with progress_bar(self, len(rows), shown=shown) as bar:
            for chunk in self._chunks(rows):
                unpatched = self._unpatched([rows[i] for i in chunk])

                def reply(i: int, clean: Mapping[Ids, Mapping[int, Tensor]] = unpatched) -> Reply | None:
                    try:
                        return self._reply(rows[i], request(i), clean.get(rows[i].ids, {}))
                    except _WriteError:
                        return None

                done = self._each(reply, chunk, bar)
                # The plug-in loses positions if the server splits a prompt, which it does under load: so once more,
                # with nothing else in flight.
                for i in [i for i, made in zip(chunk, done, strict=True) if made is None]:
                    replies[i] = self._reply(rows[i], request(i), unpatched[rows[i].ids])
                replies |= {i: made for i, made in zip(chunk, done, strict=True) if made is not None}
        return [replies[i] for i in range(len(rows))]

    def _reply(self, row: _Row, request: Request, unpatched: Mapping[int, Tensor]) -> Reply:
        """The reply to one row, its edits made."""
        if not row.edits:
            return self.server.complete(self.served.name, request)
        if request.max_new_tokens > 1 and row.is_written_at_start:
            return self._reply_by_token(row, request)
        additions: list[Addition] = []
        written: dict[int, tuple[Tensor, Tensor]] = {}
        for layer, edits in row.edits.items():
            known = unpatched if layer in unpatched and not additions else self._with(row.ids, additions, layer)
            before = known[layer].float()
            after = writer(edits, len(row.ids), self.info.d_head)(before[None])[0]
            written[layer] = before, after
            positions = tuple(sorted({len(row.ids) + edit.position for edit in edits}))
            additions.append(Addition(layer, positions, (after - before)[list(positions)]))
        layers = tuple({*request.layers, *written})
        reply = self.server.complete(
            self.served.name, replace(request, additions=tuple(additions), layers=layers, salt=secrets.token_hex(16))
        )
        for layer, (before, after) in written.items():
            self._check(row, layer, before, after, reply.residuals[layer])
        return reply

    def _reply_by_token(self, row: _Row, request: Request) -> Reply:
        """The reply to one row that is sent again for each token: the plug-in repeats what is added at the first
        position at every token that it generates.
        """
        new: list[int] = []
        while len(new) < request.max_new_tokens:
            one = replace(request, ids=row.ids + tuple(new), max_new_tokens=1)
            new += self._reply(row.then(new), one, {}).ids
            if new[-1] in request.stop.ids or (request.stop.text and request.stop.text in self.text.decode(new)):
                break
        return Reply(new)

    def _with(self, ids: Ids, additions: Sequence[Addition], layer: int) -> dict[int, Tensor]:
        """What is in a layer after the additions below it."""
        request = Request(ids, secrets.token_hex(16), layers=(layer,), additions=tuple(additions))
        return self.server.complete(self.served.name, request).residuals

    def _check(self, row: _Row, layer: int, before: Tensor, after: Tensor, actual: Tensor) -> None:
        """Raise if a layer does not hold what it should: at the positions written to, and at all others.

        What is missing or too much is measured in writes: if one was not made, the difference holds -1 of it.
        """
        tolerance = max(1e-4, 8 * torch.finfo(actual.dtype).eps)
        difference = actual.float() - after
        writes = (after - before)[[len(row.ids) + edit.position for edit in row.edits[layer]]]
        writes = writes[writes.norm(dim=-1) > 0]
        share = difference @ writes.T / writes.square().sum(dim=-1)
        scale = before.norm(dim=-1) + after.norm(dim=-1)
        close = difference.norm(dim=-1) <= tolerance * scale
        if bool(close.all()) and bool((share.abs() < 0.5).all()):
            return
        wrong = ((~close) | (share.abs() >= 0.5).any(dim=-1)).nonzero().flatten().tolist()
        raise _WriteError(
            f"{self.name}: a write into layer {layer} of a row of {len(row.ids)} tokens was not made as it was asked "
            f"for (positions {wrong[:10]} hold something else); the server may have split the prompt: start it with "
            "--no-enable-chunked-prefill, or use a smaller in_flight"
        )

    def _unpatched(self, rows: Sequence[_Row]) -> dict[Ids, dict[int, Tensor]]:
        """For each different row with edits, what is in the layers that they begin at."""
        layers: dict[Ids, set[int]] = {}
        for row in rows:
            if row.lowest is not None:
                layers.setdefault(row.ids, set()).add(row.lowest)

        def read(ids: Ids) -> dict[int, Tensor]:
            request = Request(ids, self._salt, layers=tuple(layers[ids]))
            return self.server.complete(self.served.name, request).residuals

        self.positions_run += sum(map(len, layers))
        return dict(zip(layers, self._each(read, list(layers)), strict=True))

    def _chunks(self, rows: Sequence[_Row]) -> Iterator[list[int]]:
        """The rows' numbers, as many at once as unpatched activations of can be kept."""
        chunk: list[int] = []
        known: set[tuple[Ids, int]] = set()
        numbers = 0
        for i, row in enumerate(rows):
            key = (row.ids, -1 if row.lowest is None else row.lowest)
            new = 0 if row.lowest is None or key in known else len(row.ids) * self.d_model
            if chunk and numbers + new > _KEPT_NUMBERS:
                yield chunk
                chunk, known, numbers, new = [], set(), 0, len(row.ids) * self.d_model
            chunk.append(i)
            known.add(key)
            numbers += new
        if chunk:
            yield chunk

    def _each(self, work: Callable[[Item], Result], items: Sequence[Item], bar: Bar | None = None) -> list[Result]:
        """The results of all items, in order, many at once. The first error ends the others."""
        self.server.persist()
        with ThreadPoolExecutor(self.server.in_flight) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                for future in as_completed(futures):
                    future.result()
                    if bar is not None:
                        bar.update(1)
            except BaseException:
                self.server.give_up()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def _logits(self, reply: Reply) -> Float[Tensor, " d_vocab"]:
        """Log-probabilities are logits, up to a constant."""
        logits = torch.full((self.info.d_vocab,), -torch.inf, dtype=torch.float32, device="cpu")
        ids = torch.tensor(list(reply.logprobs), device="cpu")
        logits[ids] = torch.tensor(list(reply.logprobs.values()), dtype=torch.float32, device="cpu")
        if not bool(logits.isfinite().all()):
            raise EngineError(
                f"the server at {self.server.url} returned log-probabilities of {len(reply.logprobs)} tokens, and "
                f"{self.name} has {self.info.d_vocab}"
            )
        return logits


def _stacked(
    replies: Sequence[Reply], weights: Float[Tensor, "batch *sum window"] | None
) -> Float[Tensor, "batch layer *sum width"]:
    layers = [torch.stack([reply.residuals[layer] for layer in sorted(reply.residuals)]).float() for reply in replies]
    return torch.stack([weighted(each, None if weights is None else weights[i]) for i, each in enumerate(layers)])
