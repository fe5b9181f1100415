"""Use the weights that ``gguf2gpu hold`` keeps in GPU memory, from Python and without a copy.

    import gguf2gpu

    with gguf2gpu.attach() as model:                       # the usual socket, the only model
        q = model["blk.0.attn_q.weight"].torch()           # on the GPU, the holder's memory itself
        weights = model.state_dict(hf=True)                # by the names of Hugging Face's transformers

It needs Linux, Python 3.9 and nothing else; NumPy and PyTorch are used where they are. All errors are of the class
Error.
"""

from __future__ import annotations

from typing import Any, Dict, Optional

from ._errors import (
    Closed,
    DeviceError,
    Error,
    Gone,
    HolderError,
    NoHolder,
    ProtocolError,
    UnknownModel,
    UnknownNames,
    Unsupported,
)
from ._hf import empty_weights, load_transformers
from ._model import Model, Tensor, attach
from ._wire import models, socket_path

__version__ = "0.1.0"

__all__ = [
    "Closed",
    "DeviceError",
    "Error",
    "Gone",
    "HolderError",
    "Model",
    "NoHolder",
    "ProtocolError",
    "Tensor",
    "UnknownModel",
    "UnknownNames",
    "Unsupported",
    "attach",
    "empty_weights",
    "load_transformers",
    "models",
    "socket_path",
    "state_dict",
]


def state_dict(
    socket: Optional[str] = None,
    model: Optional[str] = None,
    hf: bool = True,
    framework: str = "torch",
    timeout: Optional[float] = None,
    rank: Optional[int] = None,
    world: Optional[int] = None,
) -> Dict[str, Any]:
    """Attach to a model, wait until it is loaded and return its tensors by name, as arrays that keep it mapped.

    With hf, names are those of Hugging Face's transformers, tied weights have both of their names, and what llama.cpp's
    converter did is undone: fused tensors are divided and experts are single tensors (views, without a copy); q and k
    of llama, mistral and mixtral get the order of rows of transformers, and the norms of gemma lose the 1 that was
    added to them (copies on the same device). UnknownNames says for which architectures that is known;
    Model.state_dict(hf=False) gives the names of the GGUF file. Quantized blocks are Unsupported with hf.

    framework is "torch" or "numpy". socket, model, timeout, rank, world and errors are those of attach, and timeout
    also bounds how long the model may take to load."""
    attached = attach(socket, model, timeout, rank=rank, world=world)
    attached.wait(timeout)
    return attached.state_dict(hf, framework)
