"""A server for tests that speaks as `vllm serve` with vllm-lens 1.3 does: plain Hugging Face with plain hooks, one row
at a time. Its names were written down from the plug-in's source (`_helpers/types.py`, `_helpers/_serialize.py`).
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor


@dataclass
class Faults:
    """What goes wrong: so many requests get no answer, additions are ignored or are made somewhere else for so many
    rows, the plug-in is not there, log-probabilities are few, or the server is down from when `is_down()` is true.
    """

    unanswered: int = 0
    lost: int = 0
    moved: int = 0
    without_plugin: bool = False
    few_logprobs: bool = False
    is_down: Callable[[], bool] = lambda: False


@dataclass
class LensServer:
    """A model behind HTTP, what it was asked, and how many rows it had at once."""

    plain: Any
    blocks: Any
    tokenizer: Any
    folder: str
    n_ctx: int = 128
    faults: Faults = field(default_factory=Faults)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    at_once: int = 0
    most_at_once: int = 0

    @contextmanager
    def running(self, port: int = 0) -> Iterator[str]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(200, {"data": [{"id": "tiny", "root": server.folder, "max_model_len": server.n_ctx}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                faults = server.faults
                with server.lock:
                    server.bodies.append(body)
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                    faults.unanswered -= 1
                    is_silent = faults.is_down() or faults.unanswered >= 0
                try:
                    if is_silent:
                        self.close_connection = True
                        self.connection.close()
                        return
                    self.reply(*server.complete(body))
                finally:
                    with server.lock:
                        server.at_once -= 1

            def reply(self, status: int, answer: Any) -> None:
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        http.daemon_threads = True
        http.handle_error = lambda *args: None  # type: ignore[method-assign]  # a connection that was closed on purpose
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}"
        finally:
            http.shutdown()
            http.server_close()
            thread.join()

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        ids, options = list(body["prompt"]), body.get("vllm_xargs") or {}
        assert body["temperature"] == 0
        assert all(isinstance(each, str) for each in (body["cache_salt"], *options.values()))
        if body.get("logprobs") is not None and self.faults.few_logprobs:
            text = "Requested sample logprobs of 320, which is greater than max allowed: 20"
            return 400, {"error": {"message": text, "type": "BadRequestError", "code": 400}}
        if len(ids) + body["max_tokens"] > self.n_ctx:
            return 400, {"error": {"message": "the maximum context length is exceeded"}}
        steering = json.loads(options.get("apply_steering_vectors", "[]"))
        wanted = json.loads(options["output_residual_stream"]) if "output_residual_stream" in options else None
        with self.lock:  # the hooks are on the one model
            new, states, logprobs = self.generate(ids, body, steering)
        choice: dict[str, Any] = {"index": 0, "text": self.tokenizer.decode(new), "finish_reason": "length"}
        if body.get("return_token_ids"):
            choice |= {"token_ids": new, "prompt_token_ids": ids}
        if body.get("logprobs") is not None:
            top = {f"token_id:{i}": float(logprobs[i]) for i in logprobs.argsort(descending=True)[: body["logprobs"]]}
            choice["logprobs"] = {"tokens": [], "top_logprobs": [top]}
        answer: dict[str, Any] = {"object": "text_completion", "model": "tiny", "choices": [choice]}
        if wanted is not None and not self.faults.without_plugin:
            kept = [states[layer] for layer in range(len(self.blocks)) if layer in wanted]
            answer["activations"] = {"residual_stream": serialized(torch.stack(kept))}
        return 200, answer

    def generate(self, ids: list[int], body: dict[str, Any], steering: list[Any]) -> tuple[list[int], Any, Tensor]:
        """New tokens, the states of every layer after the additions, and log-probabilities of the first new token."""
        writes = [] if self.faults.without_plugin else self.writes(steering)
        new: list[int] = []
        first = torch.zeros(0)
        while True:
            # As in the plug-in, an addition at the first position is repeated at every new token.
            again = [(layer, len(ids) + i, row) for layer, at, row in writes if at == 0 for i in range(len(new))]
            logits, states = self.run(ids + new, writes + again)
            first = first if new else logits.log_softmax(-1)
            new.append(int(logits.argmax()))
            ends = new[-1] in body["stop_token_ids"] or any(
                text in self.tokenizer.decode(new, skip_special_tokens=True) for text in body["stop"]
            )
            if ends or len(new) == body["max_tokens"]:
                return new, states, first

    def writes(self, steering: list[Any]) -> list[tuple[int, int, Tensor]]:
        """(layer, position, vector) of each addition."""
        if steering and self.faults.lost > 0:
            self.faults.lost -= 1
            return []
        moves = int(bool(steering) and self.faults.moved > 0)
        self.faults.moved -= moves
        writes = []
        for vector in steering:
            assert not vector["norm_match"]
            for layer, rows in zip(vector["layer_indices"], deserialized(vector["activations"]), strict=True):
                for position, row in zip(vector["position_indices"], rows, strict=True):
                    writes.append((layer, position - moves, row * vector["scale"]))
        return writes

    def run(self, ids: list[int], writes: list[tuple[int, int, Tensor]]) -> tuple[Tensor, dict[int, Tensor]]:
        states: dict[int, Tensor] = {}

        def hook_of(layer: int) -> Any:
            def hook(module: Any, args: Any, output: Any) -> Any:
                hidden = (output[0] if isinstance(output, tuple) else output).clone()
                for at, position, vector in writes:
                    if at == layer:
                        hidden[0, position] += vector
                states[layer] = hidden[0]
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            return hook

        handles = [block.register_forward_hook(hook_of(layer)) for layer, block in enumerate(self.blocks)]
        try:
            with torch.no_grad():
                return self.plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float(), states
        finally:
            for handle in handles:
                handle.remove()


def serialized(tensor: Tensor) -> dict[str, Any]:
    is_half = tensor.dtype == torch.bfloat16
    values = (tensor.view(torch.int16) if is_half else tensor).numpy()
    return {
        "data": base64.b64encode(zstandard.ZstdCompressor(level=1).compress(values.tobytes())).decode(),
        "dtype": str(values.dtype),
        "original_dtype": str(tensor.dtype),
        "shape": list(values.shape),
        "compression": "zstd",
    }


def deserialized(encoded: dict[str, Any]) -> Tensor:
    raw = base64.b64decode(encoded["data"])
    if encoded.get("compression") == "zstd":
        raw = zstandard.ZstdDecompressor().decompress(raw)
    return torch.from_numpy(np.frombuffer(raw, np.dtype(encoded["dtype"])).reshape(encoded["shape"]).copy())
