"""`generation_kwargs`: which settings of transformers' sampler the loss is right with.

The loss takes a sampled token for one of the policy's softmax at `temperature`, over the tokens
that the sampler kept. So a setting is one of four kinds: it leaves tokens out, which is recorded as
a support; it changes the probabilities of the kept ones, so that the sampler records its own, and
rollout correction weights the token; it changes neither; or it is refused.
"""

import json
from typing import Any

from grpo_fused.checks import nearest

LEAVES_OUT = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "encoder_no_repeat_ngram_size",
    "epsilon_cutoff",
    "eta_cutoff",
    "forced_eos_token_id",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "suppress_tokens",
    "top_h",
    "typical_p",
)
REWEIGHTS = (
    "encoder_repetition_penalty",
    "exponential_decay_length_penalty",
    "sequence_bias",
    "watermarking_config",
)
COMPUTES = (
    "cache_config",
    "cache_implementation",
    "disable_compile",
    "max_cache_len",
    "prefill_chunk_size",
    "renormalize_logits",
    "use_cache",
)
FOR_SAMPLES = ("epsilon_cutoff", "eta_cutoff", "top_h", "typical_p")  # not for greedy completions
OF_TOKENS = ("bad_words_ids", "begin_suppress_tokens", "forced_eos_token_id", "suppress_tokens")
IMPLIED = {"do_sample": True, "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1}

NO_DISTRIBUTION = (
    "tokens must be drawn one by one from one distribution, over which the loss forms its ratios"
)
OWN_OPTIONS = {
    "max_length": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "min_p": "min_p",
    "num_return_sequences": "num_generations",
    "repetition_penalty": "repetition_penalty",
    "stop_strings": "stop_strings",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}
REFUSED = {
    name: f"it has an option of its own, {option}" for name, option in OWN_OPTIONS.items()
} | {
    **dict.fromkeys(
        (
            *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"),
            *("assistant_ensemble_weight", "constraints", "diversity_penalty", "dola_layers"),
            *("early_stopping", "force_words_ids", "is_assistant", "length_penalty", "low_memory"),
            *("max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule"),
            *("num_beam_groups", "num_beams", "penalty_alpha", "prompt_lookup_num_tokens"),
            *("speculation_type", "target_lookbehind", "use_mtp", "continuous_batching_config"),
        ),
        NO_DISTRIBUTION,
    ),
    **dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id"),
        "special tokens are those of the tokenizer and of the model's generation config",
    ),
    **dict.fromkeys(
        ("decoder_start_token_id", "forced_bos_token_id"), "it is for encoder-decoder models"
    ),
    **dict.fromkeys(
        (
            *("output_attentions", "output_hidden_states", "output_logits", "output_scores"),
            "return_dict_in_generate",
        ),
        "the trainer decides what generate returns",
    ),
    "compile_config": "it takes an object, not values of a config file",
    "do_sample": "temperature samples, and eval_temperature 0 is greedy",
    "guidance_scale": "ranks of FSDP that have finished would miss its second forward pass",
    "max_time": "lengths that depend on the clock cannot be resumed bit for bit",
    "min_length": "it counts the padding of prompts; use min_new_tokens",
    "remove_invalid_values": "it would hide logits that are not finite",
    "token_healing": "it rewrites prompts, and the loss would be of others",
}
KNOWN = (*LEAVES_OUT, *REWEIGHTS, *COMPUTES, *REFUSED)


def check_generation_kwargs(settings: dict[str, Any]) -> dict[str, Any]:
    """Checks that the loss is right with settings of transformers' `GenerationConfig`.

    Returns:
        The settings as a checkpoint reads them back, without those that are so anyway. The
        sequences of a `sequence_bias` that is a dict, its keys, become a list.

    Raises:
        ValueError: naming the key, and why it is refused, or the nearest name of an unknown one.
    """
    found = {}
    for name, value in settings.items():
        where = f"generation_kwargs: {name} = {value!r}"
        if name in IMPLIED and type(value) is type(IMPLIED[name]) and value == IMPLIED[name]:
            continue
        if name in REFUSED:
            raise ValueError(f"{where} is refused: {REFUSED[name]}")
        if name not in KNOWN:
            raise ValueError(
                f"{where} is unknown{nearest(name, KNOWN)}; accepted are "
                f"{', '.join((*LEAVES_OUT, *REWEIGHTS, *COMPUTES))}"
            )
        if name == "cache_implementation" and value == "paged":
            raise ValueError(f"{where} is refused: {NO_DISTRIBUTION}")
        if name == "sequence_bias" and isinstance(value, dict):
            value = [[list(ids), bias] for ids, bias in value.items()]
        found[name] = value
    return plain_values("generation_kwargs", found)


def leaves_out(settings: dict[str, Any]) -> bool:
    """Returns whether some tokens may be left out."""
    return any(name in LEAVES_OUT for name in settings)


def reweights(settings: dict[str, Any]) -> bool:
    """Returns whether kept tokens may have other probabilities than the policy gives them."""
    quantized = settings.get("cache_implementation") == "quantized"
    return quantized or any(name in REWEIGHTS for name in settings)


def plain_values(name: str, mapping: dict[str, Any]) -> dict[str, Any]:
    """Returns a mapping as a checkpoint reads it back: tuples become lists; None is not set.

    Raises:
        ValueError: a value is not of JSON's types.
    """
    found = {}
    for key, value in mapping.items():
        if value is None:
            continue
        try:
            found[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            raise ValueError(
                f"{name}: {key} must be made of numbers, text, booleans, lists and mappings, "
                f"got {value!r}"
            ) from None
    return found
