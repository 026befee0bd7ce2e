# SPDX-License-Identifier: Apache-2.0
"""Which converter module belongs to which model.

A converter module (``weights/vit.py``, ``weights/clip.py``, ...) offers ``SPELLINGS``, a tuple of ``Spelling`` with our
own first, and optionally ``adapt(state, model, resize) -> notes``, which fits a state dict in our names to the model.
"""

from importlib import import_module
from types import ModuleType

from torch import nn

# Class of the model -> module. Subclasses share their parent's.
CONVERTERS: dict[str, str] = {
    "Beit": "fvm_fast.weights.beit",
    "CLIP": "fvm_fast.weights.clip",
    "ConvNeXt": "fvm_fast.weights.convnext",
    "MaskedAutoencoderViT": "fvm_fast.weights.mae",
    "SimMIM": "fvm_fast.weights.simmim",
    "SwinTransformer": "fvm_fast.weights.swin",
    "SwinTransformerV2": "fvm_fast.weights.swin",
    "TinyVit": "fvm_fast.weights.tinyvit",
    "VisionTransformer": "fvm_fast.weights.vit",
    "VisionTransformerDistilled": "fvm_fast.weights.deit",
    "VisionTransformerForSimMIM": "fvm_fast.weights.beit",
}


def converter_of(model: nn.Module) -> ModuleType:
    """The converter module of a model.

    Raises:
        ValueError: its family has none.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in CONVERTERS:
            return import_module(CONVERTERS[cls.__name__])
    known, got = ", ".join(CONVERTERS), type(model).__name__
    raise ValueError(f"weights: the model should be one of {known}, got {got}; use its own load_state_dict")
