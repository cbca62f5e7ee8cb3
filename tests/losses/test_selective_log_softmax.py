"""Log-probabilities, entropies and their gradients, over every kind of row."""

import pytest
import torch
from batches import assert_gradients_agree, make_batch, relative_error
from torch.autograd import gradcheck

import grpo_fused.kernels.launch as launch
import oracle
from grpo_fused import selective_log_softmax

# 1 and 7: less than a vector. 2047, 2049: around blocks. 32001, 50257: odd, no aligned rows.
# 152064: a padded vocabulary. The rest are those of Llama 2, Llama 3, Qwen and Gemma.
VOCABULARIES = [1, 7, 301, 2047, 2048, 2049, 32_000, 32_001, 50_257, 128_256, 151_936, 152_064]


def check(logits, ids, implementation, mask=None, temperature=1.0, tolerance=2e-6, **transform):
    """Values and gradient with random upstream gradients against the oracle."""
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(2, *ids.shape, generator=generator)
    dlogps, dentropies = upstream.to(logits.device)
    truth = oracle.selective_log_softmax(
        logits,
        ids,
        mask,
        temperature=temperature,
        dlogps=dlogps,
        dentropies=dentropies,
        **transform,
    )
    leaf = logits.detach().clone().requires_grad_(True)
    logps, entropies = selective_log_softmax(
        leaf,
        ids,
        mask,
        temperature=temperature,
        compute_entropy=True,
        implementation=implementation,
        **transform,
    )
    torch.autograd.backward([logps, entropies], [dlogps, dentropies])
    assert logps.dtype == entropies.dtype == torch.float32
    assert relative_error(logps, truth[0]) < 5e-7
    assert relative_error(entropies, truth[1]) < 2e-6
    assert (logps <= 0).all() and (entropies >= 0).all()
    assert_gradients_agree(leaf.grad, truth[2], ids, tolerance)
    return truth


def rows(V, *, T=2, dtype=torch.float32, device="cpu", scale=2.5):
    generator = torch.Generator().manual_seed(V)
    logits = scale * torch.randn(1, T, V, generator=generator)
    ids = torch.randint(0, V, (1, T), generator=generator)
    ids[0, 0] = V - 1  # the last column is where a tail is lost
    return logits.to(device, dtype), ids.to(device)


@pytest.mark.parametrize("V", VOCABULARIES)
def test_every_vocabulary(V, implementation, device):
    check(*rows(V, device=device), implementation, temperature=0.9)


@pytest.mark.parametrize("V", [7, 301, 2049])
@pytest.mark.parametrize("logit_softcap", [None, 6.0])
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_scale_softcap_and_temperatures(per, logit_softcap, V, implementation, device):
    """Logits from far inside the cap to far beyond it; what is past the row stays out."""
    logits, ids = rows(V, T=4, scale=8.0, device=device)
    logits, ids = logits.view(2, 2, V), ids.view(2, 2)
    temperature = torch.tensor([[0.6, 1.0], [1.5, 0.8]], device=device)
    temperature = temperature if per == "token" else temperature[:, 0]
    transform = {"logit_softcap": logit_softcap, "logit_scale": 0.7}
    check(logits, ids, implementation, temperature=temperature, **transform)
    if per == "token":
        options = {"compute_entropy": True, "implementation": implementation, **transform}
        padded = selective_log_softmax(logits, ids, temperature=temperature, **options)
        flat = (t.flatten(0, 1) for t in (logits, ids))
        flat = selective_log_softmax(*flat, temperature=temperature.flatten(), **options)
        assert all(torch.equal(a.flatten(), b) for a, b in zip(padded, flat, strict=True))


@pytest.mark.parametrize("V", [1, 7, 2047, 2049, 32_001])
def test_columns_past_the_vocabulary_count_for_nothing(V, implementation, device):
    """exp(0) = 1 per padded column is invisible until all logits are far below 0 (verl#2656)."""
    logits, ids = rows(V, device=device)
    check(logits - 1.0e4, ids, implementation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("V", [1, 7, 301, 2048, 2050, 4100])
def test_half_precision(dtype, V, implementation, device):
    check(*rows(V, dtype=dtype, device=device), implementation, tolerance=6e-3)


@pytest.mark.parametrize("V", [700, 1024, 9000])
@pytest.mark.parametrize("where", ["leading", "middle", "trailing", "all but the target"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_blocks_of_minus_infinity(V, where, dtype, implementation, device):
    """A leading block of -inf made NaN of the row (Liger)."""
    logits, ids = rows(V, dtype=dtype, device=device)
    blocked = {
        "leading": slice(0, V - 20),
        "middle": slice(20, V - 20),
        "trailing": slice(20, V),
        "all but the target": slice(0, V),
    }[where]
    if where == "trailing":
        ids = ids % 20
    kept = logits.gather(2, ids[..., None])
    logits[..., blocked] = -torch.inf
    logits.scatter_(2, ids[..., None], kept)
    check(logits, ids, implementation, tolerance=2e-6 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("shape", ["B T V", "B T+1 V", "N V"])
def test_layouts(shape, implementation, device):
    batch = make_batch(extra=int(shape == "B T+1 V"), device=device)
    options = {"compute_entropy": True, "implementation": implementation}
    if shape == "N V":
        logits, ids, mask = (t.flatten(0, 1) for t in (batch.logits, batch.ids, batch.mask))
        truth = oracle.selective_log_softmax(batch.logits, batch.ids, batch.mask)
        logps, entropies = selective_log_softmax(logits, ids, mask, **options)
        assert logps.shape == entropies.shape == ids.shape
        assert relative_error(logps, truth[0].flatten()) < 5e-7
    else:
        check(batch.logits, batch.ids, implementation, batch.mask)


@pytest.mark.parametrize("V", [96, 97])
@pytest.mark.parametrize("layout", ["padded rows", "sliced positions", "transposed", "offset"])
def test_strided_logits(V, layout, implementation, device):
    logits, ids = rows(V, T=5, device=device)
    logits, ids = logits.repeat(3, 1, 1), ids.repeat(3, 1)
    if layout == "padded rows":
        strided = logits.new_full((3, 5, V + 7), torch.nan)[..., :V]
    elif layout == "sliced positions":
        strided = logits.new_full((3, 8, V), torch.nan)[:, 2:7]
    elif layout == "transposed":
        strided = logits.new_full((5, 3, V), torch.nan).transpose(0, 1)
    else:
        strided = logits.new_full((3 * 5 * V + 3,), torch.nan)[3:].view(3, 5, V)
    strided.copy_(logits)
    truth = oracle.selective_log_softmax(logits, ids, dlogps=torch.ones(3, 5))
    strided.requires_grad_(True)
    logps, _ = selective_log_softmax(strided, ids, implementation=implementation)
    logps.sum().backward()
    assert relative_error(logps, truth[0]) < 5e-7
    assert relative_error(strided.grad, truth[2]) < 2e-6


def test_entropy_costs_nothing_and_is_none_when_unwanted(implementation, device):
    logits, ids = rows(301, device=device)
    assert selective_log_softmax(logits, ids, implementation=implementation)[1] is None


def test_one_output_used_alone(implementation, device):
    logits, ids = rows(301, device=device)
    for used in (0, 1):
        leaf = logits.clone().requires_grad_(True)
        outputs = selective_log_softmax(
            leaf, ids, compute_entropy=True, implementation=implementation
        )
        outputs[used].sum().backward()
        upstream = {("dlogps", "dentropies")[used]: torch.ones(ids.shape)}
        truth = oracle.selective_log_softmax(logits, ids, **upstream)[2]
        assert relative_error(leaf.grad, truth) < 2e-6


def test_backward_twice_through_a_kept_graph(implementation, device):
    logits, ids = rows(301, device=device)
    leaf = logits.clone().requires_grad_(True)
    logps, _ = selective_log_softmax(leaf, ids, implementation=implementation)
    logps.sum().backward(retain_graph=True)
    first = leaf.grad.clone()
    logps.sum().backward()
    assert torch.equal(leaf.grad, 2 * first)


@pytest.mark.parametrize("V", [32_000, 50_257, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.skipif(not launch.INTERPRETED, reason="on a device these sizes are used anyway")
def test_block_sizes_of_a_real_device(V, dtype, monkeypatch):
    """The interpreter's small blocks make many iterations; these are the blocks of an H100."""
    device = launch.Device("sm_90", warp_size=32, multiprocessors=2)
    monkeypatch.setattr(launch, "device_of", lambda index: device)
    logits, ids = rows(V, dtype=dtype)
    check(logits, ids, "triton", tolerance=2e-6 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("V", [5, 300])
def test_finite_differences(V, implementation, device):
    logits, ids = rows(V, device=device, scale=1.0)

    def outputs(x):
        options = {"compute_entropy": True, "implementation": implementation}
        return selective_log_softmax(x, ids, **options)

    leaf = logits.requires_grad_(True)
    # float32 differences of step 1e-2 are good to 1e-3.
    assert gradcheck(outputs, leaf, eps=1e-2, atol=2e-3, rtol=1e-2, fast_mode=V > 5, nondet_tol=0.0)
