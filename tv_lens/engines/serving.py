"""An engine for a running vLLM server, without importing its HTTP client before it is used."""

from __future__ import annotations

from tv_lens.engines.base import Engine
from tv_lens.errors import MissingExtraError


def vllm_engine(  # noqa: PLR0913 - its options are keywords
    url: str,
    *,
    model: str | None = None,
    served_as: str | None = None,
    api_key: str | None = None,
    in_flight: int = 64,
    timeout: float = 600.0,
    retries: int = 5,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> Engine:
    """An engine that sends its rows to `vllm serve` with the plug-in vllm-lens. Pass it to public functions as their
    `model` (see `docs/servers.md`).

    Args:
        url: where the server is, such as "http://localhost:8000".
        model: the model's name on the Hugging Face hub or its folder, for its configuration and tokenizer. None: what
            the server says that it loaded.
        served_as: the name under which the server runs it; None for the first one.
        api_key: what the server asks for, if it does.
        in_flight: how many rows the server has at once, at most.
        timeout: how long one answer may take, in seconds.
        retries: how often a row that gets no answer is sent again.
        prepend_bos: None follows the model's configuration.
        progress: whether progress bars are shown.

    Returns:
        An engine.

    Raises:
        MissingExtraError: the HTTP client is not installed.
        UnsupportedError: the server runs without vllm-lens, or the model is not a decoder-only one.
        EngineError: the server does not answer, or runs a model of another size.
        TvLensError: the configuration or the tokenizer cannot be loaded.

    Examples:
        >>> engine = tv.vllm_engine("http://localhost:8000")  # doctest: +SKIP
    """
    try:
        from tv_lens.engines.vllm import VLLMEngine
        from tv_lens.engines.vllm_wire import Server
    except ModuleNotFoundError as error:
        if error.name not in ("httpx", "zstandard"):
            raise
        raise MissingExtraError(f'a vLLM server needs {error.name}; pip install "tv_lens[vllm-lens]"') from error
    server = Server(url, api_key=api_key, timeout=timeout, retries=retries, in_flight=in_flight)
    return VLLMEngine(server, model=model, served_as=served_as, prepend_bos=prepend_bos, progress=progress)
