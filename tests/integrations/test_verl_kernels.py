"""Functions with verl's signatures against those of verl 0.9.1, and `patch_verl`."""

import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import verl_peer  # noqa: F401 - skips where verl is not installed
from batches import relative_error
from tiny_models import batch, tiny
from verl.utils import torch_functional as theirs
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.kernel import linear_cross_entropy as their_kernel

from grpo_fused.integrations import verl_kernels as ours

V, H = 97, 16


def make_rows(*shape, columns=V, dtype=torch.float32, seed=0):
    """Make values (..., columns), labels (...), and upstream gradients (...) of two results."""
    generator = torch.Generator().manual_seed(seed)
    values = 2 * torch.randn(*shape, columns, generator=generator)
    labels = torch.randint(0, V, shape, generator=generator)
    upstream = torch.randn(2, *shape, generator=generator)
    return values.to(dtype), labels, *upstream


def gradient_of(function, logits, upstream, *arguments, dtype=None):
    """Run (results, gradient of the logits); the logits are not a leaf, as those of a model."""
    leaf = logits.to(dtype or logits.dtype, copy=True).requires_grad_(True)
    results = function(leaf * 1.0, *arguments)
    results.backward(upstream.to(results.dtype))
    return results.detach(), leaf.grad


def parameters_of(function):
    """{name: (kind, default)}, without annotations."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: (p.kind, p.default) for p in parameters}


@pytest.mark.parametrize(
    "name, wants_labels",
    [
        ("logprobs_from_logits", True),
        ("entropy_from_logits", False),
        ("entropy_from_logits_with_chunking", False),
    ],
)
@pytest.mark.parametrize("shape", [(7,), (3, 5)], ids=str)
def test_from_logits(name, wants_labels, shape):
    if "chunking" in name and len(shape) > 1:
        shape = (15,)  # verl's supports only rows
    logits, labels, upstream, _ = make_rows(*shape)
    arguments = [labels] if wants_labels else []
    function = getattr(theirs, name)
    wanted = gradient_of(function, logits, upstream, *arguments, dtype=torch.float64)
    got = gradient_of(getattr(ours, name), logits, upstream, *arguments)
    assert got[0].dtype == torch.float32 and got[0].shape == shape
    for mine, truth in zip(got, wanted, strict=True):
        assert relative_error(mine, truth) < 2e-6
    assert parameters_of(getattr(ours, name)) == parameters_of(function)


def test_bfloat16_is_more_accurate():
    """Without flash-attention, verl rounds log-probabilities to bfloat16."""
    logits, labels, upstream, _ = make_rows(3, 5, dtype=torch.bfloat16)
    function = theirs.logprobs_from_logits
    truth = gradient_of(function, logits, upstream, labels, dtype=torch.float64)
    peer = gradient_of(function, logits, upstream, labels)
    mine = gradient_of(ours.logprobs_from_logits, logits, upstream, labels)
    assert relative_error(mine[0], truth[0]) < 1e-6 < 1e-3 < relative_error(peer[0], truth[0])
    assert relative_error(mine[1], truth[1]) < 2e-3 < relative_error(peer[1], truth[1])


def test_labels_with_a_dimension_of_one():
    """verl passes (1, N) with rows (N, V), which its flash path flattens."""
    logits, labels, upstream, _ = make_rows(7)
    expected = gradient_of(ours.logprobs_from_logits, logits, upstream, labels)
    got = gradient_of(ours.logprobs_from_logits, logits, upstream, labels[None])
    assert got[0].shape == (7,) and all(map(torch.equal, got, expected))
    with pytest.raises(ValueError, match=r"labels must have shape \(3, 5\)"):
        ours.logprobs_from_logits(make_rows(3, 5)[0], make_rows(5, 3)[1])


def test_inplace_backward():
    logits, labels, upstream, _ = make_rows(3, 5)
    for inplace in (True, False):
        leaf = logits.clone().requires_grad_(True)
        made = leaf * 1.0
        ours.logprobs_from_logits(made, labels, inplace_backward=inplace).backward(upstream)
        assert torch.equal(made.detach(), logits) != inplace
        assert torch.equal(leaf.detach(), logits)
    for of_a_leaf in (leaf, leaf[:, 1:]):  # verl's default is in place here too
        values = labels[:, 5 - of_a_leaf.shape[1] :]
        ours.logprobs_from_logits(of_a_leaf, values).sum().backward()
        assert torch.equal(leaf.detach(), logits)
    with torch.no_grad():
        ours.logprobs_from_logits(leaf, labels)


def test_entropy_and_log_probabilities_of_the_same_logits():
    """verl's engine computes both, then not in place."""
    logits, labels, dlogps, dentropies = make_rows(11)
    gradients = []
    for module, dtype in ((theirs, torch.float64), (ours, torch.float32)):
        leaf = logits.to(dtype, copy=True).requires_grad_(True)
        made = leaf / 0.7
        entropies = torch.utils.checkpoint.checkpoint(
            module.entropy_from_logits, made, use_reentrant=False
        )
        logps = module.logprobs_from_logits(made, labels, inplace_backward=False)
        (logps @ dlogps.to(dtype) + entropies @ dentropies.to(dtype)).backward()
        gradients.append(leaf.grad)
    assert relative_error(gradients[1], gradients[0]) < 2e-6


def test_entropy_compiles_as_verl_compiles_it():
    compiled = torch.compile(
        ours.entropy_from_logits, dynamic=True, fullgraph=True, backend="aot_eager"
    )
    for rows in (5, 9):
        logits = make_rows(rows)[0]
        assert torch.equal(compiled(logits), ours.entropy_from_logits(logits))


def logits_of_a_head(hidden, weight, labels, temperature):
    """Run verl's functions on the full logits."""
    logits = hidden @ weight.T / temperature
    return theirs.logprobs_from_logits(logits, labels), theirs.entropy_from_logits(logits)


FUSED = {
    "logits": logits_of_a_head,
    "verl": FusedLinearForPPO(),
    "ours": ours.linear_cross_entropy,
    "ours as a method": lambda *arguments: ours._fused_linear_for_ppo(None, *arguments),
}


@pytest.mark.parametrize("shape", [(9,), (2, 5)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_linear_cross_entropy(shape, temperature):
    """verl's kernel needs a GPU; its other backend gives the same results, shaped as the ids."""
    hidden, labels, *upstream = make_rows(*shape, columns=H)
    weight = 0.3 * make_rows(V, columns=H, seed=1)[0]
    results = {}
    for name, function in FUSED.items():
        dtype = torch.float64 if name == "logits" else torch.float32
        leaves = [t.to(dtype, copy=True).requires_grad_(True) for t in (hidden, weight)]
        logps, entropies = function(*leaves, labels, temperature)
        loss = (logps.flatten() * upstream[0].to(dtype).flatten()).sum()
        (loss + (entropies.flatten() * upstream[1].to(dtype).flatten()).sum()).backward()
        results[name] = (logps, entropies, *(leaf.grad for leaf in leaves))
        if name == "ours":  # flat, as from verl's kernel
            assert logps.shape == entropies.shape == (labels.numel(),)
        else:
            assert logps.shape == entropies.shape == shape
    for name, tolerance in (("verl", 1e-5), ("ours", 3e-6), ("ours as a method", 3e-6)):
        for got, truth in zip(results[name], results["logits"], strict=True):
            assert relative_error(got.flatten(), truth.flatten()) < tolerance, name


def test_signature_of_linear_cross_entropy():
    wanted = list(inspect.signature(their_kernel.LinearCrossEntropy.forward).parameters.values())
    got = list(inspect.signature(ours.linear_cross_entropy).parameters.values())
    assert [p.name for p in got] == [p.name for p in wanted[1:]]
    assert [p.default for p in got] == [p.default for p in wanted[1:]]


def test_reductions_and_temperatures():
    hidden, labels, *_ = make_rows(2, 5, columns=H)
    weight = make_rows(V, columns=H, seed=1)[0]
    logps, entropies = ours.linear_cross_entropy(hidden, weight, labels, 0.5)
    for reduction in ("sum", "mean"):
        reduced, same = ours.linear_cross_entropy(hidden, weight, labels, 0.5, reduction)
        assert torch.equal(reduced, getattr(logps, reduction)()) and torch.equal(same, entropies)
    per_token = torch.full((2, 5), 0.5)
    for temperature in (torch.tensor(0.5), per_token):
        got = ours.linear_cross_entropy(hidden, weight, labels, temperature)
        torch.testing.assert_close(got, (logps, entropies))


def test_invalid_arguments_raise():
    hidden, labels, *_ = make_rows(2, 5, columns=H)
    weight = make_rows(V, columns=H, seed=1)[0]
    for match, arguments in [
        ("labels must have shape", (hidden, weight, labels[:1])),
        ("labels must be integers", (hidden, weight, labels.float())),
        ("temperature must have shape", (hidden, weight, labels, torch.ones(2))),
        ("reduction must be one of", (hidden, weight, labels, 1.0, "max")),
        ("weight must be", (hidden, weight[:, 1:], labels)),
    ]:
        with pytest.raises(ValueError, match=match):
            ours.linear_cross_entropy(*arguments)
    alone = SimpleNamespace(size=lambda: 1)
    ours.linear_cross_entropy(hidden, weight, labels, 1.0, "none", alone)
    with pytest.raises(ValueError, match="labels must have shape"):
        ours.logprobs_from_logits(hidden, labels[:, :-1])


def test_a_bfloat16_head_is_as_exact_as_verl_s_kernel():
    """Far within the 1e-3 of verl's own test, which logits that are rounded to bfloat16 exceed."""
    hidden, labels, *_ = make_rows(64, columns=512, dtype=torch.bfloat16)
    weight = (0.1 * make_rows(V, columns=512, seed=1)[0]).bfloat16()
    leaves = [t.requires_grad_(True) for t in (hidden.clone(), weight.clone())]
    logps, entropies = ours.linear_cross_entropy(*leaves, labels, 1.5)
    log_p = (hidden.double() @ weight.double().T / 1.5).log_softmax(-1)
    want = log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    for got, exact in zip((logps, entropies), want, strict=True):
        torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=1e-5)
    rounded = (hidden @ weight.T / 1.5).float().log_softmax(-1)
    off = (rounded.gather(-1, labels[:, None])[:, 0].double() - want[0]).abs()
    assert off.max() > 1e-3


@pytest.fixture
def verl_modules(monkeypatch):
    """Restore what patch_verl replaces; returns a fake engine module of verl."""
    for module in [m for n, m in sys.modules.items() if n.split(".")[0] == "verl"]:
        for name in vars(ours):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(FusedLinearForPPO, "forward", FusedLinearForPPO.forward)
    engine = ModuleType("verl.an_engine")  # engines import functions by name
    engine.logprobs_from_logits = theirs.logprobs_from_logits
    engine.entropy_from_logits = "another object of that name"
    monkeypatch.setitem(sys.modules, engine.__name__, engine)
    return engine


def test_patch_verl(verl_modules):
    replaced = ours.patch_verl()
    assert replaced == [
        "verl.an_engine.logprobs_from_logits",
        "verl.utils.experimental.torch_functional.FusedLinearForPPO.forward",
        "verl.utils.kernel.linear_cross_entropy.linear_cross_entropy",
        "verl.utils.torch_functional.entropy_from_logits",
        "verl.utils.torch_functional.entropy_from_logits_with_chunking",
        "verl.utils.torch_functional.logprobs_from_logits",
    ]
    assert verl_modules.logprobs_from_logits is ours.logprobs_from_logits
    assert verl_modules.entropy_from_logits == "another object of that name"
    assert theirs.entropy_from_logits is ours.entropy_from_logits
    assert their_kernel.linear_cross_entropy is ours.linear_cross_entropy
    assert ours.patch_verl() == []
    hidden, labels, *_ = make_rows(2, 5, columns=H)
    weight = make_rows(V, columns=H, seed=1)[0]
    got = FusedLinearForPPO()(hidden, weight, labels, 0.7)
    wanted = ours.linear_cross_entropy(hidden, weight, labels, 0.7)
    assert got[0].shape == labels.shape
    assert all(torch.equal(a.flatten(), b) for a, b in zip(got, wanted, strict=True))


def test_patched_models(verl_modules):
    """Run verl's forward of a model with both backends of its fused kernels."""
    from verl.models.transformers import dense_common

    model, input_ids = tiny(), batch()[0]
    call = {"input_ids": input_ids, "temperature": 0.7, "return_dict": True}
    theirs_out = dense_common.forward_with_torch_backend(model, **call)
    ours.patch_verl()
    for forward in (
        dense_common.forward_with_torch_backend,
        dense_common.forward_with_triton_backend,  # works on a CPU only with ours
    ):
        out = forward(model, **call)
        for name in ("log_probs", "entropy"):
            got, wanted = out[name].flatten(), theirs_out[name].flatten()
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-6)


def test_patch_of_another_verl(monkeypatch):
    monkeypatch.delattr(theirs, "entropy_from_logits_with_chunking")
    with pytest.raises(ImportError, match="has no entropy_from_logits_with_chunking"):
        ours.patch_verl()


def test_external_lib(verl_modules, monkeypatch):
    """verl imports the module that `model.external_lib` names."""
    from verl.utils.import_utils import import_external_libs

    name = "grpo_fused.integrations.verl_patch"
    monkeypatch.delitem(sys.modules, name, raising=False)
    assert theirs.entropy_from_logits.__module__ == theirs.__name__
    import_external_libs(name)
    assert theirs.entropy_from_logits is ours.entropy_from_logits
