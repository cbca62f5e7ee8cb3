"""Models from a folder or the Hub, with or without trained adapters."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from grpo_fused.trainer.reference import is_peft_model


def load_model(name: str, dtype: torch.dtype | str, **options: Any) -> nn.Module:
    """Loads a causal language model; of a folder that holds an adapter, its base and the adapter.

    Args:
        name: a folder or a name on the Hub.
        dtype: of the weights, or "auto": that of the file.
        options: of `from_pretrained`.

    Returns:
        a transformers model, or a PeftModel whose adapter is trained further.

    Raises:
        OSError, ValueError: it cannot be loaded.
    """
    if not has_adapter(name):
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(
        name, is_trainable=True, dtype=dtype, **options
    )
    if (Path(name) / GENERATION_CONFIG_NAME).is_file():  # or the base model's stays
        model.get_base_model().generation_config = GenerationConfig.from_pretrained(name)
    return model


def quantized_options(quantization: str | None, dtype: torch.dtype | str) -> dict[str, Any]:
    """Returns the keywords of `from_pretrained` that load a model quantized by bitsandbytes.

    Args:
        quantization: "4bit", "8bit" or None.
        dtype: of the matmuls with dequantized 4-bit weights; "auto": bfloat16.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantization {quantization} needs bitsandbytes: pip install bitsandbytes"
        )
    options: dict[str, Any] = {"load_in_8bit": True}
    if quantization == "4bit":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16 if dtype == "auto" else dtype,
        }
    found: dict[str, Any] = {"quantization_config": BitsAndBytesConfig(**options)}
    if torch.accelerator.is_available():  # a quantized model cannot be moved afterwards
        found["device_map"] = {"": PartialState().device}
    return found


def has_adapter(name: str) -> bool:
    """Returns whether a folder holds an adapter instead of a model."""
    return (Path(name) / "adapter_config.json").is_file()


@contextlib.contextmanager
def absolute_base(model: Any) -> Iterator[None]:
    """Lets adapters name the folder of their base model by its absolute path for a while.

    A relative one, as it was given, is found from the current folder of the run alone.
    """
    configs = list(model.peft_config.values()) if is_peft_model(model) else []
    before = [config.base_model_name_or_path for config in configs]
    for config in configs:
        base = config.base_model_name_or_path or model.get_base_model().name_or_path
        if base and Path(base).is_dir():
            config.base_model_name_or_path = str(Path(base).resolve())
    try:
        yield
    finally:
        for config, path in zip(configs, before, strict=True):
            config.base_model_name_or_path = path
