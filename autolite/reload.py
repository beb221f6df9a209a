"""Models in and out of folders: the teacher as the user gives it, and compressed students.

Only safetensors are read or written and no code from a model's folder is executed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from autolite.architecture import ModelShape, shape_of
from autolite.errors import ModelError, StorageError, first_line
from autolite.hf_quantizer import METHOD, AutoliteConfig
from autolite.unmapped import positions_of


def save_student(model: PreTrainedModel, shape: ModelShape, folder: str | Path, tokenizer: Any = None) -> None:
    """Write config.json with the shape, model.safetensors with every shared weight once, and the tokenizer if given.

    The folder loads with plain `from_pretrained` once autolite is imported. Widths in config.json stay those of the
    original; its depth is the model's own.

    Raises:
        ModelError: if `shape` is not the shape of `model`, number formats aside.
        StorageError: if the folder cannot be written.
    """
    found = shape_of(model)
    if shape.without_formats() != found:
        raise ModelError(f"the shape to save does not describe the model: {shape} but its weights are {found}")
    before = getattr(model.config, "quantization_config", None)
    model.config.quantization_config = AutoliteConfig(shape.to_json())
    try:
        with _quietly():
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write the model to {folder}: {error}. Free some space or choose another") from error
    finally:
        if before is None:
            del model.config.quantization_config
        else:
            model.config.quantization_config = before


def load_student(folder: str | Path) -> tuple[PreTrainedModel, ModelShape]:
    """Load what `save_student` wrote: the model in float32 and evaluation mode, and its shape with number formats.

    Raises:
        ModelError: if there is no such folder, it was not written by AutoLite, or is corrupt or incomplete.
    """
    folder = Path(folder)
    config = _read_config(folder)
    manifest = config.get("quantization_config")
    if not isinstance(manifest, dict) or manifest.get("quant_method") != METHOD:
        raise ModelError(f"{folder} was not written by AutoLite: config.json has no '{METHOD}' quantization_config")
    _require_safetensors(folder)
    AutoliteConfig(**manifest)  # checks it before transformers does, and in our words
    names = config.get("architectures") or ["none"]
    kind = getattr(transformers, names[0], None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ModelError(f"{folder}/config.json names the model class {names[0]!r}, which transformers does not have")
    model, missing = _load(kind, str(folder))
    if missing:
        raise ModelError(f"{folder} is incomplete: {_some(missing)} are missing from its weights; export it again")
    return model, ModelShape.from_json(manifest["shape"])


def load_model(model: str, task_auto_class: str) -> tuple[PreTrainedModel, Any]:
    """Load a trained model in float32 and evaluation mode, and its tokenizer (None for images).

    Args:
        model: a folder, or a name on the Hugging Face hub.
        task_auto_class: the transformers class for the task, "AutoModelForSequenceClassification".

    Raises:
        ModelError: if it is not found, of a type that transformers has not or not for this task, has pickle weights
            only, is corrupt, or its head for the task was never trained.
    """
    folder = Path(model).expanduser()
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        _read_config(folder)
        model = str(folder)
    try:
        settings = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # a hub's, a file's, JSON's, or any that a value in it provokes
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"'{model}' needs code of its own, from its folder, which is never run: choose a model of a type that "
                "transformers itself has"
            ) from error
        raise ModelError(f"cannot read the configuration of '{model}': {first_line(error)}") from error
    quantized = getattr(settings, "quantization_config", None)
    if quantized and (method := quantized.get("quant_method")) != METHOD:
        raise ModelError(
            f"the weights of '{model}' are quantized already ({method}): give the model that they were made from"
        )
    auto: Any = getattr(transformers, task_auto_class)
    if type(settings) not in auto._model_mapping:
        raise ModelError(
            f"'{model}' is a '{settings.model_type}' model, of which transformers has no class for {task_auto_class}"
        )
    if folder.is_dir():
        _require_safetensors(folder)
    loaded, missing = _load(auto, model)
    body = f"{loaded.base_model_prefix}."
    if any(name.startswith(body) and "pooler" not in name for name in missing):
        raise ModelError(f"'{model}' is incomplete: {_some(missing)} are missing from its weights; download it again")
    if missing:
        raise ModelError(
            f"'{model}' has no trained head for {task_auto_class} ({_some(missing)} are missing from its weights): "
            "fine-tune it on the task first"
        )
    return loaded, _tokenizer(model, loaded) if loaded.main_input_name == "input_ids" else None


def _tokenizer(model: str, loaded: PreTrainedModel) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # whatever a tokenizer file can do wrong, from JSON to protobuf
        raise ModelError(f"cannot load the tokenizer of '{model}': {first_line(error)}") from error
    if tokenizer.pad_token is None:  # GPT-2 has none; what is padded is masked, so any token serves
        tokenizer.pad_token = tokenizer.eos_token
    if loaded.config.pad_token_id is None:
        loaded.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions_of(loaded))
    return tokenizer


def _load(kind: Any, model: str) -> tuple[PreTrainedModel, set[str]]:
    """Call `from_pretrained` safely; return the model and the names its weights lack."""
    try:
        with _quietly():
            loaded, info = kind.from_pretrained(
                model, dtype="float32", use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except ModelError:
        raise
    except OSError as error:
        if "safetensors" in str(error):
            raise ModelError(
                f"'{model}' has no safetensors weights, only pickle weights or none: convert to safetensors"
            ) from error
        raise ModelError(f"cannot load '{model}': {first_line(error)}") from error
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"'{model}' is corrupt or incomplete: {first_line(error)}") from error
    loaded.train(False)
    return loaded, set(info["missing_keys"])


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ModelError(f"there is no model folder '{folder}'; give a folder or the name of a model on the hub")
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"'{folder}' is not a model folder: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is corrupt: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is corrupt: it holds a {type(config).__name__} instead of an object")
    return config


def _require_safetensors(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"'{folder}' has only pickle weights ({pickles[0]}), which can run code when opened: convert to safetensors"
        )
    raise ModelError(f"'{folder}' has no weights: there is no .safetensors file")


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence transformers' bars and its report of missing weights: ours is the error that names them."""
    logging: Any = transformers.utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
