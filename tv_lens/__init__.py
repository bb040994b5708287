"""Read in-context-learning task vectors out of a language model, and write them back.

    from tv_lens import Task, extract, patch_generate, sweep_layers

A task vector (Hendel, Geva, Globerson 2023, arXiv 2310.15916) is the residual stream at the last position of a
few-shot prompt; layer `l` is always the output of block `l`.
"""

import lazy_loader

# Public names are listed in `__init__.pyi` and imported lazily, so that `tv-lens --help` does not import torch.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.2.0.dev0"
