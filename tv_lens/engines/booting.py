"""Boot a model by its name, with a look at its configuration first."""

from __future__ import annotations

from pathlib import Path

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig

from tv_lens.errors import TvLensError

_OTHER_INPUTS = ("vision_config", "audio_config", "speech_config")


def boot(name: str, *, device: str | None = None, dtype: torch.dtype = torch.float32) -> TransformerBridge:
    """The model with this name on the Hugging Face hub, or in this folder.

    Raises:
        TvLensError: the model cannot be loaded, it is an adapter without its model, or it is multimodal.
        TransformerLens
            installs packages into the running environment when it boots a multimodal class, so these are refused.
    """
    folder = Path(name)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise TvLensError(
            f"{name} holds a PEFT adapter, not a model; merge it with model.merge_and_unload(), save that, and use "
            "its folder"
        )
    try:
        config = AutoConfig.from_pretrained(name).to_dict()
    except Exception as error:  # of any library on the way, for any reason
        raise TvLensError(f"cannot load the model {name!r}: {error}") from error
    others = [each for each in _OTHER_INPUTS if config.get(each)]
    if others:
        raise TvLensError(
            f"{name} is a multimodal model (it has a {others[0]}), for which TransformerLens would install "
            "torchvision into this environment; load its text model with transformers and pass it as hf_model= to "
            "TransformerBridge.boot_transformers in Python"
        )
    try:
        return TransformerBridge.boot_transformers(name, device=device, dtype=dtype)
    except Exception as error:
        raise TvLensError(f"cannot load the model {name!r}: {error}") from error
