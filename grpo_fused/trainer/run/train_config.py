"""Settings of `grpo-fused train`: those of the trainer, and its model, data and rewards."""

from dataclasses import dataclass

from grpo_fused.trainer.run.config import GRPOTrainerConfig
from grpo_fused.trainer.run.options import option

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("4bit", "8bit")


@dataclass(kw_only=True)
class TrainConfig(GRPOTrainerConfig):
    """Settings of `grpo-fused train`: those of the trainer, and its model, data and rewards.

    Raises:
        ValueError: as for GRPOTrainerConfig; the model, the data or the rewards are missing.
    """

    model: str = option(
        "", "folder or Hub name of a causal language model for transformers", mutable_on_resume=True
    )
    dtype: str = option("float32", "dtype of the model's weights", choices=DTYPES)
    quantization: str | None = option(
        None,
        "bits of the frozen base model of adapters, by bitsandbytes: 4bit (NF4 with nested "
        "quantization: QLoRA) or 8bit; none: dtype",
        choices=QUANTIZATIONS,
    )
    tensor_parallel_size: int = option(
        1, "neighbouring ranks that share the model's layers and vocabulary, and a batch", low=1
    )
    fully_shard: bool = option(
        False, "shard the weights over data-parallel ranks with FSDP2, by transformers' plan"
    )
    tokenizer: str | None = option(None, "folder or Hub name; none: the model's tokenizer")
    data: str = option(
        "",
        "training rows: a .jsonl, .parquet or .csv file, a folder with such files or a saved data "
        "set, the name of a data set of the Hub, reasoning_gym:TASK",
        mutable_on_resume=True,
    )
    eval_data: str | None = option(None, "held-out rows, as data", mutable_on_resume=True)
    data_columns: dict[str, str] = option({}, "names of columns in the data, as {prompt: question}")
    data_config: str | None = option(
        None, "subset of a data set of the Hub that has several, such as main of openai/gsm8k"
    )
    data_split: str = option("train", "split to use of a data set that has several")
    eval_data_split: str | None = option(
        None, "split to use of eval_data; none: data_split", mutable_on_resume=True
    )
    data_revision: str | None = option(
        None, "branch, tag or commit of a data set of the Hub; none: the newest"
    )
    data_streaming: bool = option(
        False, "read training rows as they are needed, instead of all at the start"
    )
    task_rows: int = option(1000, "number of rows to generate for a reasoning_gym task", low=1)
    system_prompt: str | None = option(
        None, "instructions to put before text prompts, which become chats"
    )
    rewards: list[str] = option(
        [],
        "reward functions: path.py:function, module:function, exact_match, math_verify, "
        "reasoning_gym, or the folder of a reward model",
    )
    reward_model: str | None = option(
        None,
        "folder or Hub name of a reward model (a sequence classifier with one label) that is one "
        "more reward, the last, and is trained further in every iteration",
        mutable_on_resume=True,
    )
    preference: str | None = option(
        None, "reward function that says which of two completions reward_model should prefer"
    )
    reward_data: str | None = option(
        None,
        "pairs that reward_model was trained on, to be replayed: rows with prompt, chosen and "
        "rejected, as data",
        mutable_on_resume=True,
    )
    reward_weights: list[float] | None = option(None, "one weight per reward; none: 1 each")
    lora_rank: int = option(0, "rank of LoRA adapters; 0: train all weights", low=0)
    lora_alpha: float = option(32.0, "LoRA scale before division by the rank", above=0)
    lora_target_modules: list[str] | None = option(
        None, "names of layers to adapt; none: all linear layers except the LM head"
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("model", "data", "rewards"):
            if not getattr(self, name) and not (name == "rewards" and self.reward_model):
                raise ValueError(f"{name} is required, got {getattr(self, name)!r}")
        for name in ("preference", "reward_data"):
            if getattr(self, name) and not self.reward_model:
                raise ValueError(f"{name} requires reward_model, got {getattr(self, name)!r}")
        if self.reward_model and not self.preference:
            raise ValueError(
                f"reward_model {self.reward_model} requires a preference to train it by, got none; "
                "a reward model that stays as it is belongs in rewards"
            )
        if self.lora_rank and (self.tensor_parallel_size > 1 or self.fully_shard):
            raise ValueError(
                "lora_rank must be 0 with tensor_parallel_size or fully_shard, "
                f"got {self.lora_rank}: shard adapters by FSDP2 in a config of accelerate launch"
            )
        if self.quantization and (self.tensor_parallel_size > 1 or self.fully_shard):
            raise ValueError(
                "quantization must be none with tensor_parallel_size or fully_shard, "
                f"got {self.quantization!r}"
            )
        if self.eval_data and not self.eval_steps:
            raise ValueError(f"eval_data requires eval_steps, got {self.eval_data!r} without it")
        if self.eval_data_split and not self.eval_data:
            raise ValueError(
                f"eval_data_split requires eval_data, got {self.eval_data_split!r} without it"
            )
        if self.lora_target_modules and not self.lora_rank:
            raise ValueError(
                "lora_target_modules requires lora_rank, "
                f"got {self.lora_target_modules} with rank 0"
            )
        number = len(self.rewards) + bool(self.reward_model)
        if self.reward_weights is not None and len(self.reward_weights) != number:
            raise ValueError(
                f"reward_weights must be one per reward, {number}, got {len(self.reward_weights)}"
            )
