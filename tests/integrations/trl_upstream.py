"""Run TRL's own tests of its trainers, as they are and with ours in their place, and compare.

    python tests/integrations/trl_upstream.py CHECKOUT [--only EXPRESSION] [--short]

CHECKOUT is a folder with TRL's `tests` and `scripts`. Its tests load models and datasets from a
hub. Here they come from build/trl-upstream/, where the tests run: the checkout's own scripts make
them, with a local folder in place of the hub and a tokenizer of bytes in place of the published
ones. Tests of images, vLLM and remote code are left out. --only selects tests as pytest's -k does;
--short trains for one epoch where the default, three, is meant.

Prints how many tests pass with both, how many micro-batches were fused, why the others were not,
and the tests whose outcomes differ, which are the failures of this script.
"""

import argparse
import collections
import contextlib
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
import traceback
import types
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
HUB = ROOT / "build" / "trl-upstream"
FILES = ("test_grpo_trainer", "test_rloo_trainer", "experimental/test_async_grpo_trainer")
LEFT_OUT = "not vlm and not VLM and not vllm and not trust_remote_code and not Slow"
TRAINERS = {
    "GRPOTrainer": ("trl", "trl.trainer.grpo_trainer"),
    "RLOOTrainer": ("trl", "trl.trainer.rloo_trainer"),
    "AsyncGRPOTrainer": ("trl.experimental.async_grpo",),
}
REPORT = "TRL_UPSTREAM_REPORT"  # environment variables of the plugin
OURS = "TRL_UPSTREAM_OURS"
SHORT = "TRL_UPSTREAM_SHORT"

# What the tests write as ids of Qwen's vocabulary; bytes are the first 256. Numbers from 1000 on
# stand in the tests for those of a small vocabulary: see `copy_checkout`.
WORDS = {
    **{293: " b", 314: " {", 330: ' "', 397: ">\n", 411: "out", 450: "dec", 497: '",', 522: "</"},
    **{606: "name", 788: '":', 894: " any", 927: "sh", 944: "'t", 1318: "text", 1414: " know"},
    **{1513: " don", 2765: " won", 4913: '{"', 5212: ' {"', 5392: " tool", 6023: "hi"},
    **{6659: "call", 7692: "async", 9520: "step", 11248: "}}\n", 13477: "rement", 14172: "tool"},
    **{16252: " increment", 16370: "arguments", 17453: "Done", 22785: "_tool", 35744: "increment"},
    **{64648: "multiply", 93054: "_multiply", 95642: '"}}\n'},
}
PAD, EOS = 151643, 151645
MARKS = {PAD: "<|endoftext|>", 151644: "<|im_start|>", EOS: "<|im_end|>"}
MARKS |= {151657: "<tool_call>", 151658: "</tool_call>", 151665: "<tool_response>"}
MARKS |= {151666: "</tool_response>", 151667: "<think>", 151668: "</think>"}
SMALL = {i: 950 + n for n, i in enumerate(i for i in WORDS | MARKS if i >= 1000)}
VOCABULARY = 950 + len(SMALL)
TEMPLATES = {  # of the repositories whose chat template is not that of Qwen3
    **{"Qwen/Qwen2.5": "qwen2_5", "meta-llama/Llama-3.2": "llama3_2", "zai-org/GLM": "glm4moe"},
    **{"openai/gpt-oss": "gptoss", "google/gemma": "gemma", "CohereLabs": "cohere2"},
}


def make_tokenizer(name):
    """Make a tokenizer of bytes with the ids of Qwen's, and the chat template of a repository."""
    import trl
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {i: f"<unused {i}>" for i in range(VOCABULARY)} | dict(enumerate(alphabet))
    words = {i: text.replace(" ", "Ġ").replace("\n", "Ċ") for i, text in WORDS.items()}
    vocabulary |= {SMALL.get(i, i): text for i, text in (words | MARKS).items()}
    ids = {token: i for i, token in vocabulary.items()}
    inner = Tokenizer(models.BPE(vocab=ids, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens(list(MARKS.values()))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=MARKS[PAD], eos_token=MARKS[EOS]
    )
    template = next((file for start, file in TEMPLATES.items() if name.startswith(start)), "qwen3")
    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (folder / f"{template}.jinja").read_text()
    return tokenizer


def make_config(name, **options):
    """Make the configuration of a model that the checkout's scripts read from the hub."""
    from transformers import AutoConfig

    kind = {"Qwen/Qwen2": "qwen2", "Qwen/Qwen3": "qwen3", "meta-llama": "llama"}
    (kind,) = (value for start, value in kind.items() if name.startswith(start))
    kind += "_moe" if "A3B" in name else ""
    # Token ids are those of the tokenizer above.
    return AutoConfig.for_model(kind, pad_token_id=SMALL[PAD], vocab_size=VOCABULARY, **options)


def copy_checkout(checkout):
    """Copy tests and scripts to HUB, with the ids of the small vocabulary."""

    def small(match):
        number = int(match[0])
        return str(SMALL.get(number, SMALL[PAD] if 151000 < number < 152000 else number))

    for path in [*checkout.glob("tests/**/*.py"), *checkout.glob("scripts/**/*.py")]:
        text = re.sub(r"vocab_size=\d+", f"vocab_size={VOCABULARY}", path.read_text())
        copy = HUB / path.relative_to(checkout)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(re.sub(r"\b\d{4,6}\b", small, text))


def fill_hub():
    """Run the checkout's scripts that make models and datasets, with HUB in place of the hub."""
    import huggingface_hub
    import transformers
    from datasets import Dataset, DatasetDict

    def generation_config(name, **options):
        eos, pad = [SMALL[EOS], SMALL[PAD]], SMALL[PAD]
        return transformers.GenerationConfig(eos_token_id=eos, pad_token_id=pad, do_sample=True)

    needed = "".join((HUB / "tests" / f"{name}.py").read_text() for name in FILES)

    def upload(api, repo_id, operations, **options):
        for operation in operations if f'"{repo_id}"' in needed else ():
            path = HUB / repo_id / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(Path(operation.path_or_fileobj).read_bytes())
        return types.SimpleNamespace(pr_url=None)

    def upload_dataset(splits, repo_id, config_name, **options):
        for split, data in splits.items():
            data.to_parquet(HUB / repo_id / config_name / f"{split}.parquet")
        names = sorted(path.name for path in (HUB / repo_id).iterdir() if path.is_dir())
        configs = "".join(f"- config_name: {n}\n  data_dir: {n}\n" for n in names)
        (HUB / repo_id / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")

    api = huggingface_hub.HfApi
    replaced = (
        (transformers.AutoTokenizer, "from_pretrained", lambda n, **options: make_tokenizer(n)),
        (transformers.AutoConfig, "from_pretrained", make_config),
        (transformers.GenerationConfig, "from_pretrained", generation_config),
        (api, "repo_exists", lambda *args, **options: False),
        (api, "create_repo", lambda *args, **options: None),
        (api, "create_commit", upload),
        (Dataset, "push_to_hub", upload_dataset),
        (DatasetDict, "push_to_hub", upload_dataset),
    )
    sys.path.insert(0, str(HUB / "scripts"))
    with contextlib.ExitStack() as stack:
        for owner, name, function in replaced:
            stack.enter_context(mock.patch.object(owner, name, function))
        stack.enter_context(mock.patch.object(sys, "argv", ["trl_upstream"]))
        common = importlib.import_module("generate_tiny_models._common")
        # These compare with what is published.
        for name in ("check_transformers_version", "check_dtype_pattern", "print_config_diff"):
            stack.enter_context(mock.patch.object(common, name, lambda *args: None))
        runpy.run_path(str(HUB / "scripts" / "generate_zen_dataset.py"))["main"](
            0.1, True, "trl-internal-testing/zen"
        )
        for kind in ("for_causal_lm", "for_sequence_classification"):
            for path in sorted((HUB / "scripts" / "generate_tiny_models" / kind).glob("*.py")):
                try:
                    runpy.run_module(f"generate_tiny_models.{kind}.{path.stem}")
                except Exception as error:  # a model that no test here may need
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    print(f"no {path.stem}: {type(error).__name__} in {where.filename}: {error}")


class Plugin:
    """Of pytest: puts our trainers in the place of TRL's, and writes what came of it to a file."""

    def __init__(self):
        self.outcomes, self.counts = {}, collections.Counter()

    def replace_trainers(self):
        """Replace TRL's trainers before the tests import them, and count micro-batches."""
        from grpo_fused.integrations import trl as ours
        from grpo_fused.integrations.trl_head import FusedHead

        for name, modules in TRAINERS.items():
            fused = getattr(ours, f"Fused{name}")
            for module in modules:
                setattr(importlib.import_module(module), name, fused)
        compute_loss = FusedHead._compute_loss

        def counted(trainer, model, inputs, *others, **options):
            reason = trainer._why_unfused or trainer._why_trl_loss(inputs)
            self.counts["fused" if reason is None else reason] += 1
            return compute_loss(trainer, model, inputs, *others, **options)

        FusedHead._compute_loss = counted

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_collectreport(self, report):
        if report.failed:  # a file that imports what this TRL does not have
            self.outcomes[report.nodeid] = "not collected"

    def pytest_sessionfinish(self):
        found = {"outcomes": self.outcomes, "counts": self.counts}
        Path(os.environ[REPORT]).write_text(json.dumps(found))


def shorten():
    """Train for one epoch instead of the default of three."""
    from trl.trainer.base_config import _BaseConfig

    original = _BaseConfig.__post_init__

    def post_init(config):
        config.num_train_epochs = 1.0 if config.num_train_epochs == 3.0 else config.num_train_epochs
        original(config)

    _BaseConfig.__post_init__ = post_init


def pytest_configure(config):
    import torch

    def missing(name):
        if not name.startswith("is_"):
            raise AttributeError(name)
        return lambda *args, **options: False

    packages = importlib.import_module("trl.import_utils")
    # A checkout of another version asks for packages that this TRL does not look for.
    packages.__getattr__ = missing
    if not torch.cuda.is_available():  # Liger's kernels are installed, and do not run
        packages.is_liger_kernel_available = lambda *args, **options: False
    if os.environ.get(SHORT):
        shorten()
    plugin = Plugin()
    config.pluginmanager.register(plugin)
    if os.environ.get(OURS):
        plugin.replace_trainers()


def run_tests(ours, only, short):
    """Run TRL's tests; return the outcome of each, and the number of micro-batches by kind."""
    report = HUB / f"{'ours' if ours else 'stock'}.json"
    report.unlink(missing_ok=True)
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths).rstrip(os.pathsep)}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", REPORT: str(report)}
    environment |= {OURS: "1" if ours else "", SHORT: "1" if short else ""}
    selection = f"({LEFT_OUT}) and ({only})" if only else LEFT_OUT
    command = [sys.executable, "-m", "pytest", "-q", "-p", Path(__file__).stem, "-k", selection]
    command += ["--continue-on-collection-errors", "-p", "no:cacheprovider"]
    command += ["--rootdir", HUB, "-c", os.devnull]
    files = [HUB / "tests" / f"{name}.py" for name in FILES]
    with (HUB / f"{report.stem}.log").open("w") as log:
        subprocess.run([*command, *files], cwd=HUB, env=environment, stdout=log, stderr=log)
    if not report.exists():
        raise SystemExit(f"pytest did not run: see {HUB / report.stem}.log")
    return json.loads(report.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--only")
    parser.add_argument("--short", action="store_true")
    given = parser.parse_args()
    copy_checkout(given.checkout)
    if not (HUB / "trl-internal-testing").exists():
        fill_hub()
    found = {}
    for name, ours in (("TRL's", False), ("ours", True)):
        found[name] = run_tests(ours, given.only, given.short)
        counts = collections.Counter(found[name]["outcomes"].values())
        print(f"{name}: {', '.join(f'{n} {word}' for word, n in sorted(counts.items()))}")
    for reason, number in collections.Counter(found["ours"]["counts"]).most_common():
        print(f"{number} micro-batches: {reason}")
    stock, fused = (found[name]["outcomes"] for name in found)
    apart = sorted(test for test in stock | fused if stock.get(test) != fused.get(test))
    for test in apart:
        print(f"{test}: {stock.get(test)} with TRL's, {fused.get(test)} with ours")
    return int(bool(apart))


if __name__ == "__main__":
    sys.exit(main())
