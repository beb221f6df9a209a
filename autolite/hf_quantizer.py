"""What lets plain `from_pretrained` load a compressed folder: transformers takes AutoLite for a quantizer, asks it to
prepare the freshly built model, and the model gets the shape that config.json's `quantization_config` holds.

Importing this module registers it; `autolite.transformers_hook` does so as soon as transformers is imported.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from autolite.architecture import ModelShape
from autolite.errors import ModelError

METHOD = "autolite"
SCHEMA = 1


class AutoliteConfig(QuantizationConfigMixin):
    """The manifest of a compressed model: the shape its weights have.

    Raises:
        ModelError: if the manifest was written by a newer version, or is corrupt.
    """

    quant_method: Any  # transformers' enumeration cannot be extended; other packages register strings too

    def __init__(self, shape: dict[str, Any] | None = None, schema: int = SCHEMA, **other: Any) -> None:
        if schema != SCHEMA:
            raise ModelError(
                f"config.json: this model was written with schema {schema} of AutoLite's manifest, but this version "
                f"reads schema {SCHEMA}; upgrade autolite"
            )
        try:
            ModelShape.from_json(shape or {})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(
                f"config.json: the shape in its quantization_config is corrupt ({error!r}); export the model again"
            ) from None
        self.quant_method = METHOD
        self.schema = schema
        self.shape = shape


class AutoliteQuantizer(HfQuantizer):
    """Gives a freshly built model the shape of its manifest before its weights are loaded."""

    quantization_config: Any

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from autolite.reshaping import reshape

        reshape(model, ModelShape.from_json(self.quantization_config.shape))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        # The weights are ordinary floats: it may be cast, trained and saved like any model
        model.is_quantized = False
        del model.hf_quantizer
        for module in model.modules():
            if hasattr(module, "config"):
                module.config.__dict__.pop("_is_quantized", None)

    def is_serializable(self) -> bool:
        """Weights are stored as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Weights are ordinary parameters."""
        return True


def _register() -> None:
    from transformers.quantizers import auto

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(AutoliteConfig)
        auto.register_quantizer(METHOD)(AutoliteQuantizer)


_register()
