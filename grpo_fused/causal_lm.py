"""Causal language models of transformers whose forward ends in a loss: the LM head inside of it."""

import contextlib
import functools
import types

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def fuse_lm_head(model):
    """Teach `model.forward` the keyword `head`: a function that takes the place of the LM head.

    `model(..., head=function)` runs the backbone and returns `function(hidden, weight, bias=...,
    logit_scale=..., logit_softcap=...)`: exactly what `linear_grpo_loss` and
    `linear_selective_log_softmax` take of a model. It runs inside of the LM head's own module
    call, where FSDP and DeepSpeed have its weight gathered and reduce its gradient. Without `head`
    nothing changes, so that `generate` works as ever.

    Args:
        model: a transformers model with an LM head, before it is wrapped (DDP, FSDP, peft,
            Accelerate). Patched in place, once however often this is called.

    hidden is (B, L, H), or its last logits_to_keep positions where the call has that keyword.

    Raises:
        ValueError: the model's logits are not those of a plain linear head; see `why_not_fused`.

    Example:
        fuse_lm_head(model)

        def loss(hidden, weight, **head):
            return linear_grpo_loss(hidden, weight, ids, mask, advantages, **head)

        out = model(input_ids, attention_mask=..., logits_to_keep=T + 1, head=loss)
    """
    if reason := why_not_fused(model):
        raise ValueError(f"model: its LM head cannot be fused: {reason}")
    if is_fused(model):
        return
    before = model.forward
    # Not bound to this model: a deep copy takes the patch along, and has its own logits.
    logits_forward = before.__func__ if getattr(before, "__self__", None) is model else None

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, head=None, **kwargs):
        if head is not None:
            return _forward_with(self, head, *args, **kwargs)
        if logits_forward is None:
            return before(*args, **kwargs)
        return logits_forward(self, *args, **kwargs)

    forward.fused_lm_head = True
    model.forward = types.MethodType(forward, model)


def is_fused(model):
    """Whether `fuse_lm_head` was here."""
    return hasattr(getattr(model.forward, "__func__", None), "fused_lm_head")


def why_not_fused(model):
    """Why the LM head of a model cannot be fused, in a phrase; None if it can."""
    lm_head = _linear_of(model.get_output_embeddings())
    if lm_head is None:
        return "it has none"
    if type(lm_head).forward is not nn.Linear.forward:
        return f"{type(lm_head).__name__} is no plain linear layer (an adapter? quantised?)"
    weight = lm_head.weight
    if not (type(weight.data) in (torch.Tensor, DTensor) and weight.is_floating_point()):
        return f"its weight is quantised ({type(weight.data).__name__}, {weight.dtype})"
    if isinstance(weight, DTensor) and not any(map(_is_fsdp, model.modules())):
        return "its weight is sharded over the vocabulary or over hidden states"
    if model.base_model is model or getattr(model.config, "is_encoder_decoder", False):
        return f"{type(model).__name__} has no backbone that ends in hidden states"
    weights = [parameter.data for parameter in model.parameters()]
    whole = all(type(w) is torch.Tensor and w.numel() and not w.is_meta for w in weights)
    # Sharded weights (of FSDP1: none here, or empty slices of one) take a collective call.
    if weights and whole and not is_fused(model):
        return _why_logits_differ(model)


def head_scaling(config):
    """What a transformers config does to logits behind the matmul.

    Returns:
        dict: logit_scale and logit_softcap, as `linear_grpo_loss` takes them.
    """
    config = config.get_text_config()

    def first(*names):
        values = (getattr(config, name, None) for name in names)
        return next((value for value in values if value is not None), None)

    # Cohere, MuseGlimmer and Falcon-H1 multiply; Granite and MiniCPM3 divide, HyperCLOVA X says
    # the same word and multiplies (as of transformers 5.24).
    scale, divisor = first("logit_scale", "output_multiplier", "lm_head_multiplier"), None
    if scale is None:
        divisor = first("logits_scaling")
    if divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    scale = 1.0 if scale is None else float(scale)
    return {"logit_scale": scale, "logit_softcap": first("final_logit_softcapping")}


def _forward_with(model, head, *args, logits_to_keep=0, **kwargs):
    kwargs["use_cache"] = False
    hidden = model.base_model(*args, **kwargs).last_hidden_state
    if logits_to_keep:
        hidden = hidden[:, -logits_to_keep:]
    lm_head = model.get_output_embeddings()  # found anew: FSDP and peft replace it
    linear = _linear_of(lm_head)
    scaling = head_scaling(model.config)

    def instead(hidden):
        return head(hidden, linear.weight, bias=linear.bias, **scaling)

    with _forward_of(linear, instead):
        return lm_head(hidden.to(linear.weight.device))


def _linear_of(lm_head):
    """The head itself where it is an FSDP1 unit, whose own forward has to be the one called."""
    return getattr(lm_head, "_fsdp_wrapped_module", lm_head)


@contextlib.contextmanager
def _forward_of(module, function):
    """Calls of a module end in a function; its hooks run as ever."""
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _is_fsdp(module):
    return isinstance(module, torch.distributed.fsdp.FSDPModule)


def _why_logits_differ(model):
    """Compare the logits of four tokens: a model may do to them what its config does not say."""

    def logits_of(hidden, weight, *, bias, logit_scale, logit_softcap):
        # A head in float32 behind a model in bfloat16 is right: that is what `upcast` is for.
        logits = nn.functional.linear(hidden.to(weight.dtype), weight, bias) * logit_scale
        return logits if not logit_softcap else logit_softcap * torch.tanh(logits / logit_softcap)

    modes = [(module, module.training) for module in model.modules()]
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    model.eval()
    try:
        with torch.no_grad():
            expected = model(input_ids=ids).logits
            actual = _forward_with(model, logits_of, input_ids=ids)
    except Exception as error:
        return f"a forward of four tokens failed with {type(error).__name__}: {error}"
    finally:
        for module, mode in modes:
            module.training = mode
    if expected.shape != actual.shape:
        return f"logits are {tuple(expected.shape)}, of hidden states {tuple(actual.shape)}"
    expected, actual = expected.double(), actual.double()
    if not (expected - actual).norm() <= 1e-2 * expected.norm():  # 2^-8 is a rounding of bfloat16
        return f"{type(model).__name__} does more to its logits than its head and its config say"
