"""Run a loss in place of the LM head of a transformers model, so that logits are never stored."""

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from grpo_fused.parallel import is_vocab_parallel

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def fuse_lm_head(model: "PreTrainedModel") -> None:
    """Add the keyword `head` to `model.forward`: a function that replaces the LM head in that call.

    `model(..., head=function)` runs the backbone and returns

        function(hidden, weight, bias=..., logit_scale=..., logit_softcap=...)

    These are the arguments of `linear_grpo_loss` and `linear_selective_log_softmax`: hidden
    (B, L, H), or its last `logits_to_keep` positions, weight (V, H), and bias (V,) or None. The
    function runs inside the module call of the LM head, where FSDP and DeepSpeed gather the weight
    and reduce its gradient. Calls without `head` return logits as before, and `generate` works
    unchanged. A mixture of experts that is called with output_router_logits=True returns a pair,
    with the loss of its router, as `forward` computes it, behind the result of the function.

    Args:
        model: transformers model with an LM head, before DDP, FSDP, peft or Accelerate wraps it.
            The model is patched in place; a second call has no effect.

    Raises:
        ValueError: the logits of the model are more than a linear layer and the scaling in its
            config; see `why_not_fused`.

    Example:
        fuse_lm_head(model)

        def loss(hidden, weight, **head):
            return linear_grpo_loss(hidden, weight, ids, mask, advantages, **head)

        out = model(input_ids, attention_mask=..., logits_to_keep=T + 1, head=loss)
    """
    if reason := why_not_fused(model):
        raise ValueError(f"the LM head of model cannot be fused: {reason}")
    if is_fused(model):
        return
    original = model.forward
    # Keep the function, not the method bound to this model: a deep copy of the model copies the
    # patch too, and has to compute its own logits.
    logits_forward = original.__func__ if getattr(original, "__self__", None) is model else None

    @functools.wraps(type(model).forward)  # `generate` inspects the signature
    def forward(self, *args, head=None, **kwargs):
        if head is not None:
            return _forward_with_head(self, head, *args, **kwargs)
        if logits_forward is None:
            return original(*args, **kwargs)
        return logits_forward(self, *args, **kwargs)

    forward.fused_lm_head = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def base_model(model: Any) -> "PreTrainedModel":
    """Return the transformers model inside a peft model; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_fused(model: "PreTrainedModel") -> bool:
    """Return whether `fuse_lm_head` has patched the model."""
    return hasattr(getattr(model.forward, "__func__", None), "fused_lm_head")


def why_not_fused(model: "PreTrainedModel") -> str | None:
    """Return the reason why the LM head of a model cannot be fused, or None if it can.

    Unless the weights are sharded, the check includes a forward of four tokens, which compares the
    logits of the model with those of its head and config.
    """
    lm_head = _unwrap_fsdp1(model.get_output_embeddings())
    if lm_head is None:
        return "the model has none"
    if type(lm_head).forward is not nn.Linear.forward:
        return f"{type(lm_head).__name__} is not a plain linear layer (an adapter? quantised?)"
    weight = lm_head.weight
    if not (type(weight.data) in (torch.Tensor, DTensor) and weight.is_floating_point()):
        return f"its weight is quantised ({type(weight.data).__name__}, {weight.dtype})"
    fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    if isinstance(weight, DTensor) and not fsdp and not is_vocab_parallel(weight):
        mesh = weight.device_mesh.mesh_dim_names
        return f"its weight is a DTensor {list(weight.placements)} on the mesh {mesh}"
    if model.base_model is model or getattr(model.config, "is_encoder_decoder", False):
        return f"{type(model).__name__} has no backbone that returns hidden states"
    if _is_complete(model) and not is_fused(model):
        return _why_logits_differ(model)
    return None


def why_no_router_loss(model: "PreTrainedModel") -> str | None:
    """Return the reason why `model(..., head=..., output_router_logits=True)` fails, or None.

    Unless the weights are sharded, the check includes a forward of four tokens, which compares the
    loss of the router with that of the model's own forward.
    """
    if _load_balancing_loss(model) is None:
        return f"the load-balancing loss of {type(model).__name__} is not known"
    if not _is_complete(model):
        return None

    def no_head(hidden, weight, **head):
        return None

    options = {"input_ids": _four_tokens(model), "output_router_logits": True}
    options["attention_mask"] = torch.ones_like(options["input_ids"])
    try:
        with torch.no_grad(), _in_evaluation(model):
            expected = model(**options).aux_loss
            actual = _forward_with_head(model, no_head, **options)[1]
    except Exception as error:
        return f"a forward of four tokens failed with {type(error).__name__}: {error}"
    if not isinstance(expected, torch.Tensor):  # 0 of a backbone without router logits
        return f"the forward of {type(model).__name__} has {expected} as load-balancing loss"
    if not torch.allclose(expected.float(), actual.float(), rtol=1e-2, equal_nan=True):
        return f"the load-balancing loss of {type(model).__name__} is {expected}, not {actual}"
    return None


def head_scaling(config: "PretrainedConfig") -> dict[str, Any]:
    """Read from a transformers config how a model transforms the output of its LM head.

    Returns:
        {"logit_scale": float, "logit_softcap": float or None}, keywords of `linear_grpo_loss`.
    """
    config = config.get_text_config()

    def first_of(*names):
        values = (getattr(config, name, None) for name in names)
        return next((value for value in values if value is not None), None)

    # Cohere, MuseGlimmer and Falcon-H1 multiply. Granite and MiniCPM3 divide by logits_scaling,
    # HyperCLOVA X multiplies by it (transformers 5.24).
    scale = first_of("logit_scale", "output_multiplier", "lm_head_multiplier")
    if scale is None and (scaling := first_of("logits_scaling")) is not None:
        scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
    scale = 1.0 if scale is None else float(scale)
    return {"logit_scale": scale, "logit_softcap": first_of("final_logit_softcapping")}


def _is_complete(model):
    """Whether the weights are whole.

    FSDP1 leaves no parameters here, or empty slices of them: a forward would be a collective call,
    which other ranks may not make.
    """
    weights = [parameter.data for parameter in model.parameters()]
    complete = all(type(w) is torch.Tensor and w.numel() and not w.is_meta for w in weights)
    return bool(weights) and complete


def _forward_with_head(model, head, *args, logits_to_keep=0, **kwargs):
    """Run the backbone, then the LM head's module call with `head` as its forward."""
    kwargs["use_cache"] = False
    outputs = model.base_model(*args, **kwargs)
    hidden = outputs.last_hidden_state
    if logits_to_keep:
        hidden = hidden[:, -logits_to_keep:]
    lm_head = model.get_output_embeddings()  # looked up in each call: FSDP and peft replace it
    linear = _unwrap_fsdp1(lm_head)
    scaling = head_scaling(model.config)

    def forward(hidden):
        return head(hidden, linear.weight, bias=linear.bias, **scaling)

    with _replaced_forward(linear, forward):
        result = lm_head(hidden.to(linear.weight.device))
    if not kwargs.get("output_router_logits"):
        return result
    mask = kwargs.get("attention_mask")
    return result, _load_balancing_loss(model)(outputs.router_logits, attention_mask=mask)


def _load_balancing_loss(model):
    """Return the function of (router_logits, attention_mask) that the model's forward adds.

    It lies in the module of the model's class, and takes two numbers that `forward` reads from the
    model or, in multimodal ones, from the config; None if there is no such function.
    """
    modules = (sys.modules.get(base.__module__) for base in type(model).__mro__)
    found = (getattr(module, "load_balancing_loss_func", None) for module in modules)
    function = next((function for function in found if function is not None), None)
    if function is None:
        return None
    config, arguments = model.config.get_text_config(), {}
    for name, argument in (("num_experts", "num_experts"), ("num_experts_per_tok", "top_k")):
        value = getattr(model, name, None)
        value = getattr(config, name, None) if value is None else value
        if value is None or argument not in inspect.signature(function).parameters:
            return None
        arguments[argument] = value
    return functools.partial(function, **arguments)


def _unwrap_fsdp1(lm_head):
    """Return the linear layer inside an FSDP1 unit, or the module itself.

    The unit has to be the module that is called; the inner layer is the one to patch.
    """
    return getattr(lm_head, "_fsdp_wrapped_module", lm_head)


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Replace the forward of a module for a while; its hooks keep running."""
    original = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if original is not None:
            module.forward = original


def _four_tokens(model):
    return torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size


@contextlib.contextmanager
def _in_evaluation(model):
    """Put all modules into evaluation mode for a while, each then back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _why_logits_differ(model):
    """Compare the logits of four tokens, to detect transforms that the config does not mention."""

    def plain_head(hidden, weight, *, bias, logit_scale, logit_softcap):
        # A float32 head of a bfloat16 model is supported: `upcast` does the same.
        logits = nn.functional.linear(hidden.to(weight.dtype), weight, bias) * logit_scale
        return logits if not logit_softcap else logit_softcap * torch.tanh(logits / logit_softcap)

    ids = _four_tokens(model)
    try:
        with torch.no_grad(), _in_evaluation(model):
            expected = model(input_ids=ids).logits
            actual = _forward_with_head(model, plain_head, input_ids=ids)
    except Exception as error:
        return f"a forward of four tokens failed with {type(error).__name__}: {error}"
    if expected.shape != actual.shape:
        return f"its logits have shape {tuple(expected.shape)}, expected {tuple(actual.shape)}"
    finite = expected.isfinite()  # a bias of -inf takes columns out of the vocabulary
    same = torch.equal(expected[~finite], actual[~finite])
    expected, actual = expected[finite].double(), actual[finite].double()
    # bfloat16 rounds by up to 2^-8
    if not (same and (expected - actual).norm() <= 1e-2 * expected.norm()):
        return f"{type(model).__name__} transforms its logits in a way its config does not describe"
    return None
