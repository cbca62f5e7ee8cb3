"""`model/` generates as the model did in training, and is uploaded by push_to_hub."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from trainer_runs import trainer_of
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from grpo_fused import GRPOTrainerConfig
from grpo_fused.demo import make_model, make_tokenizer
from grpo_fused.trainer.run import hub
from grpo_fused.trainer.run.errors import TrainingError
from grpo_fused.trainer.run.loading import load_model

TEMPLATE = "{% for one in messages %}{{ one.content }}{% endfor %}="
ENDS = [5, 1]  # a token of the model's generation config, then the tokenizer's


@pytest.fixture
def base(tmp_path):
    """A model that ends with token 5, and a chat tokenizer that ends with token 1."""
    torch.manual_seed(3)
    model, tokenizer = make_model(make_tokenizer()), make_tokenizer()
    model.generation_config.update(eos_token_id=ENDS[:1], max_new_tokens=12, pad_token_id=None)
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, target_modules=["q_proj"])])
def test_the_saved_model_generates_as_the_trained_one(base, tmp_path, lora):
    model, tokenizer = (
        kind.from_pretrained(base) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    trainer, _ = trainer_of(
        tmp_path / "run", model=model, tokenizer=tokenizer, max_steps=2, peft_config=lora
    )
    before = model.generation_config.to_dict()
    trainer.train()
    folder = tmp_path / "run" / "model"
    assert model.generation_config.to_dict() == before, "the model in memory keeps its own"
    saved = GenerationConfig.from_pretrained(folder)
    assert (saved.eos_token_id, saved.pad_token_id, saved.max_new_tokens) == (ENDS, 0, 12)
    assert AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE

    loaded = load_model(str(folder), torch.float32)  # as a next run does
    if lora is None:
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    prompts = torch.tensor([[4, 12, 6, 13], [9, 12, 2, 13], [11, 12, 7, 13]])
    generations = []
    for one in (trainer.unwrapped.eval(), loaded.eval()):
        options = {} if one is loaded else {"generation_config": saved}
        torch.manual_seed(0)
        with torch.no_grad():
            generations.append(one.generate(input_ids=prompts, **options))
    assert torch.equal(*generations) and generations[0].shape[1] > 5
    if lora is not None:  # transformers alone reads the generation config of the base model
        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(plain.generate(prompts, generation_config=saved, do_sample=False),
                           loaded.generate(input_ids=prompts, do_sample=False))  # fmt: skip


def test_sampling_settings_that_transformers_refuses_do_not_lose_the_model(tmp_path):
    """Llama 2 and others have a temperature without do_sample."""
    model = make_model(make_tokenizer())
    model.generation_config = GenerationConfig(temperature=0.6, top_p=0.9, eos_token_id=1)
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.save_pretrained(tmp_path / "base")
    trainer, _ = trainer_of(tmp_path, model=model, max_steps=1)
    trainer.train()
    saved = GenerationConfig.from_pretrained(tmp_path / "model")
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.6, 0.9)


class Api:
    """A stand-in for `huggingface_hub.HfApi`."""

    calls, fails_in = [], None

    def __init__(self):
        Api.calls.clear()

    def create_repo(self, name, **options):
        if self.fails_in == "create_repo":
            raise OSError("Name or service not known\nand a traceback")
        self.calls.append((name, options))

        class Url(str):
            repo_id = name if "/" in name else f"me/{name}"

        return Url(f"https://huggingface.co/{Url.repo_id}")

    def upload_folder(self, **options):
        if self.fails_in == "upload_folder":
            raise RuntimeError("413 Payload Too Large")
        names = sorted(path.name for path in options["folder_path"].iterdir())
        self.calls.append((options["repo_id"], names))


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    monkeypatch.setattr(Api, "fails_in", None)
    return Api


def push(folder, **options):
    config = GRPOTrainerConfig(output_dir=str(folder), push_to_hub=True, **options)
    return hub.push_to_hub(folder / "model", config)


@pytest.mark.parametrize(
    ("options", "name", "private"),
    [
        ({}, "me/a-run", None),
        ({"hub_model_id": "team/x", "hub_private_repo": True}, "team/x", True),
    ],
)
def test_a_model_is_pushed(tmp_path, api, options, name, private):
    (tmp_path / "a-run" / "model").mkdir(parents=True)
    (tmp_path / "a-run" / "model" / "config.json").touch()
    assert push(tmp_path / "a-run", **options) == f"https://huggingface.co/{name}"
    created, uploaded = api.calls
    assert created == (options.get("hub_model_id", "a-run"), {"private": private, "exist_ok": True})
    assert uploaded == (name, ["config.json"])


@pytest.mark.parametrize(
    ("fails_in", "message"),
    [
        ("create_repo", r"me/x could not be uploaded \(Name or service not known\); nothing is lo"),
        ("upload_folder", r"me/x could not be uploaded \(413 Payload Too Large\); .*`hf upload me"),
    ],
)
def test_a_failed_push_loses_nothing(tmp_path, api, fails_in, message, monkeypatch):
    monkeypatch.setattr(Api, "fails_in", fails_in)
    options = {"push_to_hub": True, "hub_model_id": "me/x", "max_steps": 1}
    trainer, records = trainer_of(tmp_path, **options)
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert trainer.run_log.closed == 1 and list(records) == [1]


def test_what_is_pushed_when(tmp_path, api, monkeypatch):
    options = {"push_to_hub": True, "hub_model_id": "me/x", "max_steps": 1}
    trainer_of(tmp_path, **options)[0].train()
    assert [name for name, _ in api.calls] == ["me/x", "me/x"]
    assert "model.safetensors" in api.calls[1][1]
    api.calls.clear()
    trainer, _ = trainer_of(tmp_path, **options)
    monkeypatch.setattr(trainer, "run", lambda: 15)  # stopped by a signal
    trainer.train()
    assert not api.calls
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.warns(UserWarning, match="push_to_hub: there is no token.*hf auth login"):
        hub.warn_without_token(SimpleNamespace(push_to_hub=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hub.warn_without_token(SimpleNamespace(push_to_hub=False))


def test_options_of_the_hub_require_a_push():
    for options in ({"hub_model_id": "me/x"}, {"hub_private_repo": False}):
        with pytest.raises(ValueError, match="hub_model_id and hub_private_repo require push_to"):
            GRPOTrainerConfig(**options)
