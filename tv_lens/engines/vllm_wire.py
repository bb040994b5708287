"""The HTTP protocol of `vllm serve` with the plug-in vllm-lens (1.3). No other file knows its names.

One request is one row: its token ids, what is added to the residual stream at absolute positions, and which layers come
back. Vectors travel as JSON. No code is sent, and none is accepted: an answer that holds a pickle is not read.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import torch
import zstandard
from jaxtyping import Float
from torch import Tensor

from tv_lens.engines.text import Stop
from tv_lens.errors import EngineError, TvLensError, UnsupportedError

_DTYPES = {"torch.float32": torch.float32, "torch.float16": torch.float16, "torch.bfloat16": torch.bfloat16}
# What a server answers while it is busy, starting or being restarted.
_BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 30.0
NO_STOP = Stop()


@dataclass(frozen=True, eq=False)
class Addition:
    """What is added to the output of one layer at some absolute positions."""

    layer: int
    positions: tuple[int, ...]
    values: Float[Tensor, "position width"]


@dataclass(frozen=True)
class Request:
    """One row.

    `layers` come back, at every position. `salt` names the part of the server's prefix cache that the row may use:
    rows with additions need a salt that no other row has. `logprobs` is of how many tokens, the most likely ones, the
    log-probability of being the first new token comes back. An answer ends at one of the stop's ids, or at its text.
    """

    ids: tuple[int, ...]
    salt: str
    max_new_tokens: int = 1
    stop: Stop = NO_STOP
    layers: tuple[int, ...] = ()
    additions: tuple[Addition, ...] = ()
    logprobs: int = 0


@dataclass(frozen=True, eq=False)
class Reply:
    """The new tokens; the layers that were asked for, in the server's precision; log-probabilities of the next token by
    its id.
    """

    ids: list[int]
    residuals: dict[int, Float[Tensor, "pos width"]] = field(default_factory=dict)
    logprobs: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """The model that a server runs: the name for requests, where it was loaded from, and the longest row."""

    name: str
    source: str
    longest: int


class Server:
    """A running server. It can be used by several threads at once.

    A request that gets no answer is sent again, `retries` times, after 1, 2, 4, ... seconds. `timeout` is how long, in
    seconds, one answer may take, and `in_flight` how many requests are sent at once.
    """

    def __init__(self, url: str, *, api_key: str | None, timeout: float, retries: int, in_flight: int) -> None:
        if in_flight < 1:
            raise TvLensError(f"in_flight is {in_flight}; use 1 or more")
        self.url, self.retries, self.in_flight = url.rstrip("/").removesuffix("/v1"), retries, in_flight
        self._given_up = threading.Event()
        self._client = httpx.Client(
            base_url=self.url,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            limits=httpx.Limits(max_connections=in_flight, max_keepalive_connections=in_flight),
        )

    def served(self, name: str | None = None) -> Served:
        """The model called `name` there, or the first one.

        Raises:
            TvLensError: there is none of that name.
            EngineError: no answer.
        """
        models = self._send("GET", "/v1/models")["data"]
        chosen = next((each for each in models if name in (None, each["id"])), None)
        if chosen is None:
            names = ", ".join(each["id"] for each in models)
            raise TvLensError(f"the server at {self.url} runs no model called {name!r}; it runs {names}")
        return Served(chosen["id"], chosen.get("root") or chosen["id"], int(chosen["max_model_len"]))

    def complete(self, model: str, request: Request) -> Reply:
        """The server's answer to one row.

        Raises:
            UnsupportedError: the server runs without the plug-in, or gives too few log-probabilities.
            EngineError: the server refuses the row, answers something else, or does not answer.
        """
        answer = self._send("POST", "/v1/completions", _body(model, request))
        [choice] = answer["choices"]
        ids = choice.get("token_ids")
        if ids is None:
            raise UnsupportedError(f"{self.url} returns no token ids; vllm-lens needs vllm 0.30 or newer")
        return Reply([int(each) for each in ids], self._residuals(answer, request), _logprobs(choice, request))

    def give_up(self) -> None:
        """Send no request again from now on."""
        self._given_up.set()

    def persist(self) -> None:
        """Send requests that get no answer again from now on."""
        self._given_up.clear()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _residuals(self, answer: Mapping[str, Any], request: Request) -> dict[int, Tensor]:
        if not request.layers:
            return {}
        encoded = (answer.get("activations") or {}).get("residual_stream")
        if encoded is None:
            raise UnsupportedError(
                f"the server at {self.url} returns no activations; install vllm-lens beside its vLLM, and start it "
                "without VLLM_LENS_DISABLE: pip install vllm-lens; vllm serve MODEL"
            )
        stacked = decode_tensor(encoded)
        if len(stacked) != len(request.layers) or stacked.shape[1] < len(request.ids):
            raise EngineError(
                f"the server at {self.url} returned activations of shape {tuple(stacked.shape)} for "
                f"{len(request.layers)} layers of {len(request.ids)} tokens"
            )
        # Layers come back in ascending order, with the generated tokens at the end.
        own = stacked[:, : len(request.ids)]
        return dict(zip(sorted(request.layers), own, strict=True))

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a request, which is sent again if there is none."""
        problem = ""
        for attempt in range(self.retries + 1):
            if attempt and self._given_up.wait(min(2.0 ** (attempt - 1), _LONGEST_WAIT)):
                break
            try:
                response = self._client.request(method, path, json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                continue
            if response.status_code in _BUSY:
                problem = f"status {response.status_code}: {_message(response)}"
                continue
            if response.is_error:
                self._refuse(response)
            decoded: dict[str, Any] = response.json()
            return decoded
        raise EngineError(
            f"the server at {self.url} does not answer ({problem}), after {self.retries + 1} tries; start it again and "
            "repeat the call (a run kept in a folder resumes)"
        )

    def _refuse(self, response: httpx.Response) -> None:
        message = _message(response)
        if "logprobs" in message and "max allowed" in message:
            raise UnsupportedError(
                f"the server at {self.url} gives only a few log-probabilities ({message}); start it with "
                "--max-logprobs -1"
            )
        raise EngineError(f"the server at {self.url} refuses a row with status {response.status_code}: {message}")


def _body(model: str, request: Request) -> dict[str, Any]:
    """A request as JSON. Whatever the model's generation configuration says, the most likely token is chosen."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.ids),
        "max_tokens": request.max_new_tokens,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        # The ids that end an answer are given; those that the server knows may be others.
        "ignore_eos": True,
        "stop_token_ids": sorted(request.stop.ids),
        "stop": [] if request.stop.text is None else [request.stop.text],
        "return_token_ids": True,
        "cache_salt": request.salt,
    }
    if request.logprobs:
        # -1 should mean all, and vLLM 0.30 then returns none.
        body |= {"logprobs": request.logprobs, "return_tokens_as_token_ids": True}
    options = {}
    if request.layers:
        options["output_residual_stream"] = json.dumps(sorted(request.layers))
    if request.additions:
        options["apply_steering_vectors"] = json.dumps([_steering(each) for each in request.additions])
    return body | {"vllm_xargs": options} if options else body


def _steering(addition: Addition) -> dict[str, Any]:
    return {
        "activations": encode_tensor(addition.values[None]),
        "layer_indices": [addition.layer],
        "position_indices": list(addition.positions),
        "scale": 1.0,
        "norm_match": False,
    }


def _logprobs(choice: Mapping[str, Any], request: Request) -> dict[int, float]:
    """Those of the first new token, by token id."""
    if not request.logprobs:
        return {}
    [first, *_] = choice["logprobs"]["top_logprobs"]
    return {int(name.removeprefix("token_id:")): value for name, value in first.items()}


def _message(response: httpx.Response) -> str:
    try:
        error = response.json().get("error", response.text)
    except (ValueError, AttributeError):
        return response.text[:500]
    return str(error.get("message", error) if isinstance(error, dict) else error)[:500]


def encode_tensor(tensor: Tensor) -> dict[str, Any]:
    """A tensor as JSON, in float32."""
    values = tensor.detach().cpu().float().contiguous().numpy()
    return {
        "data": base64.b64encode(values.tobytes()).decode("ascii"),
        "dtype": "float32",
        "original_dtype": "torch.float32",
        "shape": list(values.shape),
    }


def decode_tensor(encoded: Mapping[str, Any]) -> Tensor:
    """A tensor from JSON, in the precision that it had on the server.

    Raises:
        EngineError: it is in another form.
    """
    try:
        raw = base64.b64decode(encoded["data"])
        if encoded.get("compression") == "zstd":
            raw = zstandard.ZstdDecompressor().decompress(raw)
        flat = np.frombuffer(raw, dtype=np.dtype(encoded["dtype"])).reshape(encoded["shape"])
        tensor = torch.from_numpy(flat.copy())
        dtype = _DTYPES[encoded["original_dtype"]]
    except (KeyError, TypeError, ValueError, zstandard.ZstdError) as error:
        raise EngineError(f"the server returned a tensor in a form that is not known: {error!r}") from error
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor.to(dtype)
