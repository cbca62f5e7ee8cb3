"""`grpo-fused train`: runs from configs and examples, resumed, interrupted and rejected."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from trainer_runs import signal_after
from transformers import AutoModelForCausalLM

from grpo_fused import cli
from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.trainer.run.checkpoint import latest_checkpoint
from grpo_fused.trainer.run.command import distribution
from grpo_fused.trainer.run.errors import OtherRankError, TrainingError
from grpo_fused.trainer.run.loading import load_model, quantized_options
from grpo_fused.trainer.run.report import plain_warnings, report_error

ROOT = Path(__file__).parents[2]
REWARDS = """
def digits(completions, completion_ids, trainer_state, **columns):
    assert trainer_state.max_steps >= trainer_state.global_step >= 0
    return [text[:1].isdigit() + 0.1 * len(ids) for text, ids in zip(completions, completion_ids)]

def wrong(completions, **columns):
    return [1.0]

def fails(completions):
    raise KeyError("no key")

def broken(completions, answer, **columns):
    return [1 / (a != "9") for a in answer]
"""


@pytest.fixture(autouse=True)
def own_accelerator():
    """Lets each run configure Accelerate, which keeps the first settings of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a tiny model of random weights, rows and rewards."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for one in messages %}{{ one.content }}{% endfor %}="
    make_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"{a}?{b}=", "answer": str(max(a, b))} for a in range(10) for b in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def arguments_of(files, output_dir, **options):
    given = {"model": files / "model", "data": files / "rows.jsonl", "output_dir": output_dir}
    given |= {"rewards": f"{files}/rewards.py:digits", "prompts_per_rollout": 2, "report_to": "[]"}
    given |= {"num_generations": 2, "max_completion_length": 2, "max_steps": 3, "save_steps": 1}
    given |= {"progress_bar": "false", "learning_rate": "1e-2"} | options
    return ["train", *(text for name, value in given.items() for text in (f"--{name}", str(value)))]


def steps_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line.get("reward") for line in lines}


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def test_a_run_and_its_files(files, tmp_path, capsys):
    options = {"eval_data": files / "rows.jsonl", "eval_steps": 2, "completions_steps": 1}
    assert cli.main(arguments_of(files, tmp_path, report_to="tensorboard", **options)) == 0
    lines = list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()))
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert {"eval/reward", "rewards/digits", "kl"} & lines[2].keys() == {
        "eval/reward",
        "rewards/digits",
    }
    assert (tmp_path / "reward.png").stat().st_size > 10_000
    names = {path.name for path in (tmp_path / "completions").iterdir()}
    steps = ["1", "2", "3", "eval-0", "eval-2", "eval-3"]
    assert names == {f"{step}.{kind}" for step in steps for kind in ("txt", "jsonl")}
    assert list(tmp_path.rglob("events.out.tfevents.*"))
    (settings,) = tmp_path.rglob("hparams.yml")
    assert "loss_type: dapo" in settings.read_text()
    before = AutoModelForCausalLM.from_pretrained(files / "model").state_dict()
    after = weights_of(tmp_path)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    first, last = (f"{steps_of(tmp_path)[step]:.3g}" for step in (1, 3))
    out, err = capsys.readouterr()
    assert re.fullmatch(
        rf"trained 3 of 3 steps in [0-9.]+ s; reward {first} -> {last}; (no gradient.*; )?model, "
        rf"metrics.jsonl, reward.png, completions, checkpoints in {tmp_path}",
        out.splitlines()[-1],
    )


def test_a_resumed_run_is_the_run_that_never_stopped(files, tmp_path, capsys, no_plot):
    options = {"num_iterations": 2, "beta": 0.1, "rewards": f"[{files}/rewards.py:digits]"}
    assert cli.main(arguments_of(files, tmp_path / "a", **options)) == 0
    assert cli.main(arguments_of(files, tmp_path / "b", **options | {"max_steps": 1})) == 0
    resumed = options | {"resume": "latest"}
    assert cli.main(arguments_of(files, tmp_path / "b", **resumed)) == 0
    assert steps_of(tmp_path / "a") == steps_of(tmp_path / "b")
    one, other = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(one[name], other[name]) for name in one)

    assert cli.main(arguments_of(files, tmp_path / "b", **resumed | {"beta": 0.2})) == 1
    assert "resume: beta is 0.2, the checkpoint has 0.1" in capsys.readouterr().err
    assert cli.main(arguments_of(files, tmp_path / "b", **options)) == 1
    assert "of an earlier run; set resume=latest to continue that run" in capsys.readouterr().err


def test_the_gsm8k_example(files, tmp_path, monkeypatch, no_plot):
    pytest.importorskip("math_verify")
    monkeypatch.chdir(ROOT)
    given = {"model": files / "model", "output_dir": tmp_path, "max_completion_length": 3}
    given |= {"prompts_per_rollout": 2, "num_generations": 2, "max_steps": 3, "lora_rank": 2}
    command = ["train", "examples/gsm8k.yaml"]
    command += [text for name, value in given.items() for text in (f"--{name}", str(value))]
    assert cli.main(command) == 0
    assert len(steps_of(tmp_path)) == 3


def test_a_folder_with_an_adapter_is_trained_further(files, tmp_path, monkeypatch, capsys, no_plot):
    """The model of a LoRA run is a model of the next, wherever that is started."""
    monkeypatch.chdir(files)
    options = {"model": "model", "beta": 0.1, "rewards": f"{files}/rewards.py:digits"}
    lora = {"lora_rank": 2, "max_steps": 2}
    assert cli.main(arguments_of(files, tmp_path / "a", **options | lora)) == 0
    first = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    monkeypatch.chdir(tmp_path)
    options |= {"model": tmp_path / "a" / "model"}
    command = arguments_of(files, tmp_path / "b", **options, max_steps=1, learning_rate="0.0")
    assert cli.main(command) == 0
    lines = list(map(json.loads, (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()))
    assert lines[0]["kl"] == 0 and lines[0]["grad_norm"] > 0
    second = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "b" / "model")
    weights = first.state_dict()
    assert any("lora_B" in name and weight.any() for name, weight in weights.items())
    for name, weight in second.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert cli.main(arguments_of(files, tmp_path / "c", **options | lora)) == 1
    assert "holds an adapter, which is trained further: lora_rank" in capsys.readouterr().err


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_adapters_of_a_quantized_model(files, tmp_path, bits, no_plot):
    """QLoRA: the base is quantized, the adapter trains, and a resumed run is the same run."""
    bnb = pytest.importorskip("bitsandbytes")
    options = {"quantization": bits, "lora_rank": 2, "beta": 0.1, "num_iterations": 2}
    assert cli.main(arguments_of(files, tmp_path / "a", **options)) == 0
    lines = list(map(json.loads, (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()))
    assert lines[0]["ratio/max"] == 1 and lines[0]["kl"] == 0 < lines[1]["kl"]
    assert cli.main(arguments_of(files, tmp_path / "b", **options, max_steps=1)) == 0
    assert cli.main(arguments_of(files, tmp_path / "b", **options, resume="latest")) == 0
    assert steps_of(tmp_path / "a") == steps_of(tmp_path / "b")
    saved = latest_checkpoint(tmp_path / "b") / "model.safetensors"
    assert all("lora_" in name for name in load_file(saved))
    dtype = torch.float32
    model = load_model(str(files / "model"), dtype, **quantized_options(bits, dtype))
    kind = bnb.nn.Linear4bit if bits == "4bit" else bnb.nn.Linear8bitLt
    assert isinstance(model.model.layers[0].mlp.up_proj, kind)
    assert type(model.lm_head) is torch.nn.Linear


def test_quantization_needs_adapters_and_its_package(files, tmp_path, monkeypatch, capsys):
    assert cli.main(arguments_of(files, tmp_path, quantization="4bit")) == 1
    assert "quantization 4bit requires lora_rank, because" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="quantization 8bit needs bitsandbytes: pip install"):
        quantized_options("8bit", torch.float32)


def test_the_example_of_sums(files, tmp_path, monkeypatch, no_plot):
    monkeypatch.chdir(ROOT)
    rows = tmp_path / "sums.jsonl"
    subprocess.run([sys.executable, "examples/sums.py", rows], check=True)
    assert len(rows.read_text().splitlines()) == 36
    command = ["train", "examples/sums.yaml", "--model", str(files / "model"), "--max_steps", "1"]
    assert cli.main([*command, "--data", str(rows), "--output-dir", str(tmp_path / "run")]) == 0
    assert steps_of(tmp_path / "run") == {1: 0.0}
    monkeypatch.syspath_prepend("examples")
    from sums import right_sum

    assert right_sum(["5\n3", " 5\n", "5", "55\n", "4\n"], ["5"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_sigterm_saves_and_the_run_can_be_resumed(files, tmp_path, capsys):
    command = arguments_of(files, tmp_path, max_steps=100_000, save_steps="none")
    with signal_after(signal.SIGTERM, tmp_path / "metrics.jsonl", lines=2):
        assert cli.main(command) == 128 + signal.SIGTERM
    done = len(steps_of(tmp_path))
    assert f"interrupted after {done} of 100000 steps" in capsys.readouterr().out
    assert (tmp_path / f"checkpoint-{done}").is_dir() and (tmp_path / "reward.png").exists()
    command = arguments_of(files, tmp_path, max_steps=done + 1, save_steps="none", resume="latest")
    assert cli.main(command) == 0
    assert list(steps_of(tmp_path)) == list(range(1, done + 2))


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        (4, {"tensor_parallel_size": 3}, "tensor_parallel_size must divide the 4 ranks, got 3"),
        (4, {"tensor_parallel_size": 2}, "fully_shard is needed for 2 data-parallel ranks"),
    ],
)
def test_ranks_that_do_not_fit(ranks, options, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(ValueError, match=message):
        distribution(SimpleNamespace(**{"fully_shard": False} | options))


def test_distributions(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for tensor, fully_shard, want in ((1, False, None), (1, True, (1, 4)), (4, False, (4, 1))):
        config = SimpleNamespace(tensor_parallel_size=tensor, fully_shard=fully_shard)
        found = distribution(config).get("distributed_config")
        assert (found and (found.tp_size, found.fsdp_size)) == want


@pytest.mark.slow
def test_a_launcher_of_tensor_parallel_ranks(files, tmp_path):
    """The command distributes the model; the checkpoint is one of shards."""
    options = {"max_steps": 2, "tensor_parallel_size": 2, "save_steps": 1}
    start = "-m torch.distributed.run --standalone --nproc_per_node 2 -m grpo_fused.cli".split()
    command = [sys.executable, *start, *arguments_of(files, tmp_path, **options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=240)
    assert list(steps_of(tmp_path)) == [1, 2]
    assert (tmp_path / "model" / "model.safetensors").exists()
    assert (tmp_path / "checkpoint-2" / "shards" / ".metadata").exists()


@pytest.mark.slow
def test_sigterm_of_a_launcher_and_its_ranks(files, tmp_path):
    """The launcher forwards the signal to ranks that have it already, and waits 30 s for them."""
    start = "-m torch.distributed.run --standalone --nproc_per_node 2 -m grpo_fused.cli".split()
    process = subprocess.Popen(
        [
            sys.executable,
            *start,
            *arguments_of(files, tmp_path, max_steps=10**5, save_steps="none"),
        ],
        cwd=tmp_path,  # not the checkout, whose folders must not be importable
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    path = tmp_path / "metrics.jsonl"
    while not (path.exists() and path.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    done = len(steps_of(tmp_path))
    assert process.returncode != 0
    assert output.count(f"interrupted after {done} of 100000 steps") == 1
    assert output.count("SIGTERM: stopping after this step") == 1
    last = latest_checkpoint(tmp_path)
    assert last.name == f"checkpoint-{done}"
    assert {path.name for path in last.iterdir()} >= {"rank_0.pt", "rank_1.pt"}
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "options, code, message",
    [
        ({"max_stpes": 3}, 2, "there is no option max_stpes (did you mean max_steps?)"),
        ({"max_steps": "many"}, 2, "max_steps must be an integer, got 'many'"),
        ({"loss_type": "grop"}, 2, "loss_type must be one of grpo, "),
        ({"rewards": ""}, 2, "rewards is required, got []"),
        ({"data": "nowhere.jsonl"}, 1, "no such file or folder: nowhere.jsonl"),
        ({"rewards": "nowhere.py:f"}, 1, "there is no file nowhere.py"),
        ({"model": "{files}/none"}, 1, "/none cannot be loaded (there is no such folder): "),
        ({"rewards": "{files}/rewards.py:wrong"}, 1, "reward wrong must return one value per com"),
        ({"rewards": "{files}/rewards.py:fails"}, 1, "reward fails failed at rewards.py:"),
        ({"data_columns": "{prompt: question}"}, 1, "has no column question, only prompt, an"),
    ],
)
def test_invalid_input_gives_one_line(files, tmp_path, capsys, options, code, message):
    options = {k: str(v).replace("{files}", str(files)) for k, v in options.items()}
    assert cli.main(arguments_of(files, tmp_path / "run", **options)) == code
    lines = capsys.readouterr().err.splitlines()
    assert message in [line for line in lines if line.startswith("grpo-fused train: ")][0]
    assert not (tmp_path / "run").exists(), "a refused run leaves no folder of a tracker or a log"


def test_a_stream_of_a_file(files, tmp_path, no_plot):
    options = {"data_streaming": True, "shuffle_buffer_size": 5, "max_steps": 2, "save_steps": 1}
    assert cli.main(arguments_of(files, tmp_path, **options)) == 0
    path = tmp_path / "checkpoint-2" / "trainer.json"
    taken = 2 * json.loads(path.read_text())["config"]["prompts_per_rollout"]
    place = json.loads(path.read_text())["place in data"]
    assert (place["epoch"], place["row"]) == divmod(taken, 30)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "rows.jsonl",
            "output_dir must be a folder, got '.*/rows.jsonl': .*/rows.jsonl is not one",
        ),
        ("rows.jsonl/run", "output_dir must be a folder, got '.*/run': .*/rows.jsonl is not one"),
        (
            "locked/run",
            "output_dir '.*/locked/run' cannot be written to: no permission in .*locked",
        ),
        ("x" * 300, "output_dir '.*xxx' cannot be written to: File name too long"),
        ("a\0b", "output_dir '.*b' cannot be written to: embedded null byte"),
    ],
)
def test_an_output_dir_that_cannot_be_written(files, name, message, capsys, monkeypatch):
    (files / "locked").mkdir(exist_ok=True)  # for root, who may write anywhere, too
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: "locked" not in str(path) and access(path, mode)
    )
    monkeypatch.setattr("grpo_fused.trainer.run.command.load_model", None)  # checked before it
    assert cli.main(arguments_of(files, files / name)) == 1
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_a_plain_run_prints_no_warnings_of_libraries(files, tmp_path):
    """In a process of its own: pytest and earlier tests have seen to the warnings of this one."""
    options = {"eval_data": files / "rows.jsonl", "eval_steps": 1, "max_steps": 1, "lora_rank": 2}
    options |= {"report_to": "tensorboard", "progress_bar": "true", "beta": 0.1}
    command = [sys.executable, "-m", "grpo_fused.cli", *arguments_of(files, tmp_path, **options)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    bars = done.stderr.replace("\r", "\n").strip().splitlines()
    assert bars and all(re.match(r" *\d+%\|.*/1 \[|$", line) for line in bars), done.stderr
    assert "truncated" in bars[-1] and "ratios clipped" in bars[-1]
    assert done.stdout.startswith("trained 1 of 1 steps in ") and done.stdout.count("\n") == 1


def test_ranks_report_once(monkeypatch, capsys, tmp_path):
    """The first that fails; a launcher of torch learns of it, too."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(store.port)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    errors = [OtherRankError("see the other"), ValueError("steps"), ValueError("steps")]
    for rank, error in enumerate([*errors, TrainingError("a collective failed")]):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"{rank}.json"))
        report_error("grpo-fused train", error)
    assert capsys.readouterr().err == "grpo-fused train: steps\n"
    (path,) = tmp_path.iterdir()
    failure = ProcessFailure(local_rank=1, pid=2, exitcode=1, error_file=str(path))
    assert "steps" in ChildFailedError("train", {1: failure}).format_msg()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # another attempt
    report_error("grpo-fused train", ValueError("again"))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    for _ in range(2):  # not under such a launcher: better twice than never
        report_error("grpo-fused train", ValueError("alone"))
    names = [line.split()[-1] for line in capsys.readouterr().err.splitlines()]
    assert names == ["again", "alone", "alone"]


def test_warnings_of_a_command(capsys, monkeypatch):
    others = []
    monkeypatch.setattr(warnings, "showwarning", lambda text, *_: others.append(str(text)))
    with plain_warnings("grpo-fused train"):
        warnings.warn_explicit("ours", UserWarning, "/a/grpo_fused/trainer/x.py", 3)
        warnings.warn_explicit("deprecated", FutureWarning, "/a/peft/x.py", 3, module="peft.x")
        warnings.warn_explicit("theirs", UserWarning, "/a/peft/x.py", 3, module="peft.x")
    assert capsys.readouterr().err == "grpo-fused train: ours\n" and others == ["theirs"]


def test_a_failing_reward_stops_the_run_with_its_line(files, tmp_path, capsys, no_plot):
    options = {"rewards": f"{files}/rewards.py:broken", "max_steps": 99, "save_steps": "none"}
    command = arguments_of(files, tmp_path, **options)
    assert cli.main(command) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search("broken failed at rewards.py:[0-9]+ on a batch of .*ZeroDivision", said)
    lines = steps_of(tmp_path) if (tmp_path / "metrics.jsonl").exists() else {}
    assert list(lines) == list(range(1, len(lines) + 1))


def test_help_and_no_arguments(capsys):
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: grpo-fused train|evaluate CONFIG.yaml")
    assert "--learning_rate" in text
    assert "Paths are relative to the current folder, those in CONFIG.yaml too." in text
    assert cli.main(["train"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "train a language model with the settings of a config file" in capsys.readouterr().out


def test_every_example_is_a_config():
    from grpo_fused.trainer import TrainConfig
    from grpo_fused.trainer.run.options import load_options

    for path in (ROOT / "examples").glob("*.yaml"):
        config = load_options(TrainConfig, path)
        assert yaml.safe_load(path.read_text())["model"] == config.model
