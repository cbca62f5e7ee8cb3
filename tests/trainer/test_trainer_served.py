"""Rollouts from vLLM servers, against a stub of their protocol: samples, weights, resume."""

import queue
import sys
import types
import warnings

import pytest
import torch
from peft import LoraConfig
from served import drop, refuse, served
from trainer_runs import ROWS, trainer_of, weights_of
from vllm_stub import Dropped

from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.trainer.collect import collect
from grpo_fused.trainer.rollouts import vllm_server, vllm_weights
from grpo_fused.trainer.run.checkpoint import list_checkpoints
from grpo_fused.trainer.run.errors import RolloutError

SYNC = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"]


def test_servers_sample_from_the_policy_of_now(tmp_path, stubs):
    """Their weights, which were others, are the policy's before every rollout."""
    (stub,) = stubs()
    trainer, records = served(tmp_path, [stub], num_iterations=2, max_steps=6, temperature=0.7)
    trainer.train()
    for step, metrics in records.items():
        assert metrics["rollout/logp_difference"] < 1e-5 and metrics["rollout/kl"] < 1e-5
        assert metrics["rollout/policy_version"] == (step - 1) // 2 * 2
    assert records[1]["ratio/max"] == 1.0 < records[2]["ratio/max"]
    requests = [path for path in stub.paths() if path in (*SYNC, "/v1/completions")]
    assert requests == [*SYNC, *["/v1/completions"] * 4] * 3, "one request per prompt of a group"
    body = next(body for _, path, body in stub.log if path == "/v1/completions")
    assert (body["n"], body["max_tokens"], body["temperature"]) == (4, 2, 0.7)
    assert "seed" not in body and not (tmp_path / "served").exists()


def test_a_rollout_has_the_log_probabilities_and_versions_of_its_tokens(tmp_path, stubs):
    trainer, _ = served(tmp_path, stubs(), generation_batch_size=3)
    trainer.source.start()
    trainer.step = 7
    batch = collect(trainer).batch
    policy = trainer.policy.logps(trainer.unwrapped, batch)
    mask = batch.completion_mask
    assert (batch.sampling_logps - policy)[mask].abs().max() < 1e-5
    assert (batch.versions[mask] == 7).all() and (batch.versions[~batch.attended] == 0).all()


def test_servers_return_what_their_filters_kept(tmp_path, stubs):
    """Ratios are over the support: a policy on its own samples has a weight of 1."""
    trainer, records = served(tmp_path, stubs(), top_k=3, top_p=0.9, min_p=0.05, temperature=1.3)
    trainer.source.start()
    batch = collect(trainer).batch
    assert batch.support_counts[batch.attended].max() == 3
    trainer, records = served(tmp_path, stubs(), top_k=3, top_p=0.9, max_steps=2)
    trainer.train()
    for metrics in records.values():
        assert metrics["rollout/weight_min"] == pytest.approx(1, abs=1e-4)


def test_adapters_are_loaded_in_place(tmp_path, served_folder, stubs):
    (stub,) = stubs()
    stub.settings["lora_config"] = {"max_lora_rank": 4}
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    options = {"peft_config": lora, "vllm_sync": "adapter", "max_steps": 3}
    torch.manual_seed(9)
    trainer, records = served(tmp_path, [stub], model=make_model(make_tokenizer()), **options)
    trainer.train()
    assert all(metrics["rollout/logp_difference"] < 1e-5 for metrics in records.values())
    assert stub.paths().count("/v1/load_lora_adapter") == 3
    names = {body["model"] for _, path, body in stub.log if path == "/v1/completions"}
    assert names == {vllm_weights.ADAPTER} and stub.adapters.keys() == names
    torch.manual_seed(9)
    trainer, _ = served(tmp_path, [stub], model=make_model(make_tokenizer()), **options)
    trainer.train()  # after another run with adapters
    stub.version = "model-1234-5"
    with pytest.raises(ValueError, match="another run has changed its base model, to version mod"):
        trainer.train()


class Communicator:
    """NCCL's broadcast, through the memory of this process."""

    sent: "queue.Queue" = queue.Queue()

    def __init__(self, group, device):
        self.group = group

    def broadcast(self, tensor, src, stream):
        Communicator.sent.put(tensor.clone())


def test_nccl_sends_every_weight_once(tmp_path, stubs, monkeypatch):
    """The protocol alone: no NCCL here."""
    created = []

    class Group:
        @staticmethod
        def create(*arguments):
            created.append(arguments)

    for name, content in {
        "vllm": {},
        "vllm.distributed": {},
        "vllm.distributed.device_communicators": {},
        "vllm.distributed.device_communicators.pynccl": {"PyNcclCommunicator": Communicator},
        "vllm.distributed.utils": {"StatelessProcessGroup": Group},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    (stub,) = stubs()
    stub.broadcast = Communicator.sent
    with pytest.raises(ValueError, match="vllm_sync must be folder without a CUDA device, got nc"):
        served(tmp_path, [stub], vllm_sync="nccl")
    trainer, records = served(tmp_path, [stub], max_steps=3)
    trainer.source.transfer = vllm_weights.NCCLTransfer(trainer)
    with pytest.raises(ValueError, match="start it with --weight-transfer-config"):
        trainer.train()
    stub.settings["weight_transfer_config"] = {"backend": "nccl"}
    trainer.train()
    assert all(metrics["rollout/logp_difference"] < 1e-5 for metrics in records.values())
    joined = stub.joined
    assert created == [(joined["master_address"], joined["master_port"], 0, 2)]
    assert (joined["rank_offset"], joined["world_size"], joined["packed"]) == (1, 2, False)
    order = ["/pause", "/start_weight_update", "/update_weights", "/finish_weight_update"]
    order += ["/reset_prefix_cache", "/update_weight_version", "/resume"]
    assert [p for p in stub.paths() if p in (*order, "/v1/completions")][:7] == order
    assert stub.paths().count("/init_weight_transfer_engine") == 1, "one group for the run"


def test_servers_share_the_prompts(tmp_path, stubs):
    pair = stubs(2)
    trainer, _ = served(tmp_path, pair, max_steps=1)
    trainer.train()
    assert [len(stub.prompts()) for stub in pair] == [2, 2]


def test_a_server_that_dies_in_a_rollout_is_named_and_its_prompts_go_to_the_others(tmp_path, stubs):
    """It comes back with other weights, and gets those of the policy."""
    first, second = stubs(2)

    def die(body):
        if trainer.step == 1:
            first.stop()
            first.faults.clear()
            raise Dropped

    first.faults["/v1/completions"] = die
    trainer, records = served(tmp_path, [first, second], max_steps=4, vllm_retries=1)
    log = trainer.log

    def at_the_end_of_a_step(metrics):
        if trainer.step == 2:
            first.restart()
        log(metrics)

    trainer.log = at_the_end_of_a_step
    with pytest.warns(UserWarning, match=f"vLLM server {first.url} is lost: the connection fail"):
        trainer.train()
    assert all(metrics["rollout/logp_difference"] < 1e-5 for metrics in records.values())
    assert len(second.prompts()) == 2 + 4 + 2 + 2 and trainer.step == 4


def test_what_a_restarted_server_sampled_does_not_count(tmp_path, stubs):
    first, second = stubs(2)

    def restart(body):
        if first.version.endswith("-1"):
            first.forget()

    first.faults["/v1/completions"] = restart
    trainer, records = served(tmp_path, [first, second], max_steps=3)
    with pytest.warns(UserWarning, match="its weights are version 'default' instead of"):
        trainer.train()
    assert all(metrics["rollout/logp_difference"] < 1e-5 for metrics in records.values())


RESUMED = {"beta": 0.1, "reference_refresh_rollouts": 1, "reference_mix": 0.5, "max_steps": 6}
RESUMED |= {"num_iterations": 2}


def test_when_all_servers_fail_the_steps_are_in_a_checkpoint(tmp_path, stubs):
    """It continues as if nothing had happened: the reference is not refreshed twice."""
    (stub,) = stubs()
    refreshed = []
    options = RESUMED | {"on_refresh": lambda trainer: refreshed.append(trainer.step)}
    whole, expected = served(tmp_path / "whole", [stub], **options)
    whole.train()
    assert refreshed == [2, 4]

    trainer, records = served(tmp_path / "cut", [stub], **options)
    stub.faults["/v1/completions"] = lambda body: trainer.step == 4 and drop(body)
    with pytest.raises(RolloutError, match=f"no vLLM server is left.*{stub.url}: the con.*resume"):
        trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path / "cut")] == ["checkpoint-4"]
    stub.faults.clear()
    resumed, later = served(tmp_path / "cut", [stub], resume="latest", seed=8, **options)
    resumed.train()
    assert refreshed == [2, 4, 2, 4]
    assert all(later[step] == expected[step] for step in (5, 6))
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], weight), name


def test_a_run_resumes_from_every_step(tmp_path, stubs):
    """Bit by bit, here where the server draws the same again."""
    (stub,) = stubs()
    options = RESUMED | {"max_steps": 4}
    saved = {"save_steps": 1, "save_total_limit": None}
    whole, expected = served(tmp_path / "whole", [stub], **options, **saved)
    whole.train()
    for path in list_checkpoints(tmp_path / "whole")[:-1]:
        resumed, records = served(tmp_path / "again", [stub], resume=str(path), **options)
        resumed.train()
        assert records == {step: expected[step] for step in records} and 4 in records


def test_a_checkpoint_that_is_there_stays_as_it_is(tmp_path, stubs):
    (stub,) = stubs()
    trainer, _ = served(tmp_path, [stub], save_steps=1)
    stub.faults["/collective_rpc"] = lambda body: trainer.step == 2 and refuse(500, "no")(body)
    with pytest.raises(RolloutError, match="_rpc was refused with HTTP 500: no.; all 2 steps"):
        trainer.train()
    newest = list_checkpoints(tmp_path)[-1]
    assert newest.name == "checkpoint-2"
    written = {path: path.stat().st_mtime_ns for path in newest.iterdir()}
    trainer, _ = served(tmp_path, [stub], save_steps=1, resume="latest")
    stub.faults["/collective_rpc"] = refuse(500, "no")
    with pytest.raises(RolloutError, match="checkpoint-2: resume=latest continues"):
        trainer.train()
    assert written == {path: path.stat().st_mtime_ns for path in newest.iterdir()}


def test_equal_prompts_are_one_request(tmp_path, stubs):
    (stub,) = stubs()
    trainer, _ = served(tmp_path, [stub], data=[ROWS[0], ROWS[1], ROWS[0]], prompts_per_rollout=3)
    trainer.source.start()
    batch = collect(trainer).batch
    assert len(stub.prompts()) == 2
    numbers = [body["n"] for _, path, body in stub.log if path == "/v1/completions"]
    assert sorted(numbers) == [4, 8] and len(batch.completion_ids) == 12


def test_the_key_of_a_server_is_sent(tmp_path, stubs, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    server = vllm_server.VLLMServer(stubs()[0].url + "/", 5.0, 0)
    seen = []
    send = vllm_server.OPENER.open
    monkeypatch.setattr(
        vllm_server.OPENER,
        "open",
        lambda request, timeout: seen.append(request.headers) or send(request, timeout=timeout),
    )
    assert server.models()["policy"]["parent"] is None
    assert seen[0]["Authorization"] == "Bearer secret"


def test_generate_stays_the_source_of_others(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer, records = trainer_of(tmp_path, max_steps=1)
    trainer.train()
    assert not any(name.startswith(("rollout/", "seconds/sync")) for name in records[1])
