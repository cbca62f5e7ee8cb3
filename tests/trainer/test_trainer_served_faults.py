"""vLLM servers that do not fit, answer wrongly, refuse or fail, and settings that are refused."""

import socket
import time

import pytest
import torch
from peft import LoraConfig
from served import drop, in_settings, refuse, served
from transformers import AutoModelForCausalLM

from grpo_fused import GRPOTrainerConfig
from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.trainer.rollouts import vllm_server, vllm_weights
from grpo_fused.trainer.run.checkpoint import list_checkpoints
from grpo_fused.trainer.run.errors import RolloutError, TrainingError


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize(
    "options, spoil, message",
    [
        ({"vllm_servers": [closed_port()]}, None, "not ready after 0.2 s: the connection failed"),
        ({"vllm_model": "other"}, None, "it serves policy, not vllm_model = 'other'"),
        ({}, lambda s: s.faults.update({"/v1/models": refuse(401, "Unauthorized")}), "HTTP 401: U"),
        ({}, lambda s: setattr(s, "settings", None), "start it with VLLM_SERVER_DEV_MODE=1"),
        (
            {},
            lambda s: in_settings(s, "model_config", logprobs_mode="raw_logprobs"),
            "start it with --logprobs-mode processed_logprobs, got raw_logprobs",
        ),
        (
            {},
            lambda s: in_settings(s, "model_config", max_model_len=2),
            "its --max-model-len must be at least 3, .* got 2",
        ),
        ({"top_k": 13}, None, "returns 20 log-.* top_k = 13 start it with --max-logprobs 21"),
        (
            {},
            lambda s: s.faults.update({"/server_info": drop}),
            "it does not tell its settings .the connection failed",
        ),
        ({}, lambda s: setattr(s, "settings", {}), "an answer is not as in vLLM's protocol"),
    ],
)
def test_a_server_that_does_not_fit_is_an_error_before_anything_is_written(
    tmp_path, stubs, options, spoil, message
):
    (stub,) = stubs()
    if spoil is not None:
        spoil(stub)
    trainer, records = served(tmp_path / "run", [stub], **options)
    with pytest.raises(ValueError, match=f"vllm_servers: http://127.0.0.1:[0-9]+: .*{message}"):
        trainer.train()
    assert not records and not (tmp_path / "run").exists()
    assert "/pause" not in stub.paths()


def test_a_server_of_another_model_or_with_a_tied_head(tmp_path, served_folder, stubs):
    (stub,) = stubs()
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 7}')
    stub.settings["model_config"]["model"] = str(tmp_path)
    trainer, _ = served(tmp_path, [stub])
    with pytest.raises(ValueError, match="another model: num_hidden_layers 7 instead of 2"):
        trainer.train()

    config = make_model(make_tokenizer()).config
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stub.settings["model_config"]["model"] = "on/another/machine"
    trainer, records = served(tmp_path, [stub], model=model, max_steps=3)
    with pytest.raises(ValueError, match="on a CPU vLLM keeps the old head .* serve a copy whose"):
        trainer.train()
    stub.settings["model_config"]["model"] = str(served_folder)  # its head is its own
    trainer.train()
    assert all(metrics["rollout/logp_difference"] < 1e-5 for metrics in records.values())


def test_a_server_on_another_machine_needs_a_folder(tmp_path, stubs, monkeypatch):
    (stub,) = stubs()
    monkeypatch.setattr(vllm_weights, "LOCAL", ())
    with pytest.raises(ValueError, match="another machine: set vllm_folder .* 127.0.0.1 sees"):
        served(tmp_path, [stub])[0].train()
    trainer, records = served(tmp_path, [stub], vllm_folder=str(tmp_path / "shared"), max_steps=2)
    trainer.train()
    assert records[2]["rollout/logp_difference"] < 1e-5 and stub.log
    assert (tmp_path / "shared").exists() and not list((tmp_path / "shared").iterdir())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lora_config": None}, "--enable-lora --max-lora-rank 4"),
        ({"lora_config": {"max_lora_rank": 2}}, "--enable-lora --max-lora-rank 4"),
        ({"lora_config": {"max_lora_rank": 8}}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    ],
)
def test_a_server_that_takes_no_adapters(tmp_path, stubs, settings, message):
    (stub,) = stubs()
    stub.settings |= settings
    stub.environment = {}
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    trainer, _ = served(tmp_path, [stub], peft_config=lora, vllm_sync="adapter")
    with pytest.raises(ValueError, match=message):
        trainer.train()


def of_first(**values):
    """Changes the first choice, and the log-probabilities of it."""

    def change(choices):
        for name, value in values.items():
            place = choices[0] if name in choices[0] else choices[0]["logprobs"]
            place[name] = value(place[name]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (of_first(logprobs=None), "log-probabilities of a completion are missing"),
        (of_first(token_logprobs=lambda v: [None, *v[1:]]), "log-probabilities .* are missing"),
        (of_first(token_logprobs=lambda v: v[:-1]), "log-probabilities are those of"),
        (of_first(tokens=lambda v: ["token_id:99", *v[1:]]), "are those of .'token_id:99'"),
        (of_first(token_logprobs=lambda v: [float("nan"), *v[1:]]), "must be finite .* got nan"),
        (of_first(token_logprobs=lambda v: [-9999.0, *v[1:]]), "must be finite .* got -9999"),
        (of_first(prompt_token_ids=[5]), r"is of the prompt \[5\], asked for was"),
        (of_first(token_ids=[]), "ended with .* after 0 of at most 2 tokens"),
        (of_first(token_ids=[4, 5, 6]), "after 3 of at most 2 tokens"),
        (of_first(token_ids=[4], finish_reason="length"), "with 4, which is none of the end tok"),
        (of_first(finish_reason="abort"), "ended with 'abort'"),
        (lambda choices: choices.pop(), "4 completions were asked for, 3 came"),
        (lambda choices: choices[0].pop("token_ids"), "lack what was asked for .KeyError"),
    ],
)
def test_answers_to_another_question_stop_the_run(tmp_path, stubs, change, message):
    (stub,) = stubs()
    stub.change = change
    trainer, records = served(tmp_path, [stub])
    with pytest.raises(RolloutError, match=message):
        trainer.train()
    assert not records and not list_checkpoints(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda top: [{"token_id:2": 0.0}] * len(top), "the sampled [0-9]+ among them"),
        (lambda top: [{k: v - 1 for k, v in x.items()} for x in top], "got 0.3[0-9]+ in"),
        (lambda top: top[:-1], "lack what was asked for"),
    ],
)
def test_probabilities_that_are_not_of_what_was_kept(tmp_path, stubs, change, message):
    (stub,) = stubs()
    stub.change = of_first(top_logprobs=change)
    with pytest.raises(RolloutError, match=message):
        served(tmp_path, [stub], top_k=3)[0].train()


@pytest.mark.parametrize(
    "path, fault, message",
    [
        ("/pause", refuse(404, "Not Found"), "/pause.mode=wait was refused with HTTP 404: Not F"),
        ("/collective_rpc", refuse(500, "shapes differ"), "HTTP 500: shapes differ"),
        ("/collective_rpc", drop, "the connection failed"),
        ("/update_weight_version", refuse(422, "no"), "/update_weight_version was refused"),
        ("/resume", refuse(500, "no"), "/resume was refused with HTTP 500: no"),
        ("/weight_info", refuse(404, "Not Found"), "/weight_info was refused with HTTP 404"),
    ],
)
def test_weights_that_are_refused_stop_the_run(tmp_path, stubs, path, fault, message):
    (stub,) = stubs()
    stub.faults[path] = fault
    trainer, records = served(tmp_path, [stub], vllm_retries=0)
    with pytest.raises(RolloutError, match=message):
        trainer.train()
    assert not records
    assert stub.paused == (path == "/resume"), "other users of the server go on"


def test_a_cache_that_stays_full_stops_the_run(tmp_path, stubs, monkeypatch):
    (stub,) = stubs()
    answers, reset = [False, True, False, False], stub._reset_prefix_cache

    def sometimes(body):
        return reset(body) if answers.pop(0) else {"success": False}

    monkeypatch.setattr(stub, "_reset_prefix_cache", sometimes)
    trainer, records = served(tmp_path, [stub], vllm_retries=1)
    with pytest.raises(RolloutError, match="its cache of prefixes, made with old weights, stays"):
        trainer.train()
    assert list(records) == [1]


def test_weights_that_cannot_be_written_stop_the_run(tmp_path, stubs):
    (tmp_path / "file").write_text("")
    trainer, _ = served(tmp_path, stubs(), vllm_folder=str(tmp_path / "file"))
    with pytest.raises(TrainingError, match="weights could not be written to .*/file/"):
        trainer.train()


def test_a_passing_fault_is_waited_for(tmp_path, stubs, monkeypatch):
    """1, 2, 4, ... times as long; what does not pass is not asked again."""
    (stub,) = stubs()
    waits, faults = [], [refuse(503, "loading"), drop, refuse(429, "busy")]
    monkeypatch.setattr(vllm_server.time, "sleep", waits.append)
    stub.faults["/v1/completions"] = lambda body: faults and faults.pop(0)(body)
    served(tmp_path, [stub], prompts_per_rollout=1, max_steps=1)[0].train()
    assert waits == [0.01, 0.02, 0.04] and len(stub.prompts()) == 4
    stub.faults["/v1/completions"] = refuse(400, "too long")
    with pytest.raises(RolloutError, match="HTTP 400: too long"):
        served(tmp_path, [stub], prompts_per_rollout=1)[0].train()
    assert len(stub.prompts()) == 5


def test_a_server_that_does_not_answer_is_given_up(tmp_path, stubs):
    (stub,) = stubs()
    stub.faults["/v1/completions"] = lambda body: time.sleep(0.5)
    trainer, _ = served(tmp_path, [stub], vllm_timeout=60.0, vllm_retries=9)
    (server,), sync = trainer.source.servers, trainer.source.sync

    def then_hurry(version):
        assert server.timeout == 60
        sync(version)
        server.timeout = 0.1

    trainer.source.sync = then_hurry
    with pytest.raises(RolloutError, match="/v1/completions was not answered within 0.1 s"):
        trainer.train()


def test_a_server_that_starts_is_waited_for(tmp_path, stubs):
    (stub,) = stubs()
    faults = [refuse(503, "starting")] * 3
    stub.faults["/health"] = lambda body: faults and faults.pop()(body)
    served(tmp_path, [stub], max_steps=1, vllm_start_timeout=1)[0].train()
    assert stub.paths().count("/health") == 4


def test_a_server_with_other_weights_shows(tmp_path, stubs, monkeypatch):
    """As one would that ignores what it is sent: a metric, and a warning."""
    (stub,) = stubs()
    monkeypatch.setattr(stub, "_collective_rpc", lambda body: {"results": [None]})
    trainer, records = served(tmp_path, [stub], max_steps=1)
    with torch.no_grad():
        trainer.unwrapped.lm_head.weight.mul_(20)
    with pytest.warns(UserWarning, match="log-probabilities of the servers are far from those"):
        trainer.train()
    assert records[1]["rollout/logp_difference"] > 0.1


def test_a_prompt_that_a_server_has_no_room_for(tmp_path, stubs):
    (stub,) = stubs()
    in_settings(stub, "model_config", max_model_len=5)
    trainer, _ = served(tmp_path, [stub])
    with pytest.raises(ValueError, match="a prompt of 4 tokens leaves 1 of the servers' --max-mod"):
        trainer.train()
    assert not stub.prompts()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rollout_source": "vlm"}, "rollout_source must be"),
        ({"rollout_source": "vllm"}, r"rollout_source vllm requires vllm_servers, got \[\]"),
        ({"vllm_servers": ["http://a"]}, "vllm_servers requires rollout_source vllm"),
        ({"vllm_servers": ["localhost:8000"]}, "must be addresses as http://host:8000, got 'loc"),
        ({"vllm_servers": ["http://localhost:port"]}, "must be addresses as http://host:8000, got"),
        ({"vllm_servers": ["http://localhost:99999"]}, "must be addresses as http://host:8000, go"),
        ({"vllm_servers": ["http://a", "http://a/"]}, "vllm_servers must differ"),
        ({"top_p": 0.9}, "top_p and min_p require top_k with rollout_source vllm"),
        ({"min_p": 0.1}, "top_p and min_p require top_k with rollout_source vllm"),
        ({"temperature": 0.005}, "temperature must be at least 0.01 with rollout_source vllm"),
        ({"vllm_timeout": 0.0}, "vllm_timeout must be above 0"),
        ({"vllm_sync": "disk"}, "vllm_sync must be"),
    ],
)
def test_settings_that_contradict_each_other(options, message):
    source = {"rollout_source": "vllm", "vllm_servers": ["http://a"]}
    if options.keys() & source.keys() and "localhost" not in str(options):
        source = {"rollout_source": "vllm"} if len(options.get("vllm_servers", [])) == 2 else {}
    with pytest.raises(ValueError, match=message):
        GRPOTrainerConfig(**{**source, **options})


def test_a_source_that_does_not_fit_the_trainer(tmp_path, stubs):
    stub = stubs()
    with pytest.raises(ValueError, match="rollout_fn must be None with rollout_source vllm"):
        served(tmp_path, stub, rollout_fn=lambda prompts, trainer: {})
    with pytest.raises(ValueError, match="vllm_sync must be adapter for a model with adapters"):
        served(tmp_path, stub, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="got adapter for one that has no adapters"):
        served(tmp_path, stub, vllm_sync="adapter")
