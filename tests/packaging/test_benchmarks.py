"""The benchmark suite itself: providers agree with float64, cases, comparisons, reports."""

import functools
import json

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

import grpo_fused.kernels.launch as launch
from benchmarks import (
    bench_lengths,
    bench_linear,
    bench_logits,
    cases,
    compare,
    linear_providers,
    lines,
    measure,
    peers,
    plot_losses,
    plots,
    predict,
    providers,
    record,
    report,
)
from benchmarks.cases import Case
from grpo_fused import LOSSES, ClipCov, KlCov

SMALL = {
    "tokens": Case("", (5, 3, 4), 97, "float32"),
    "entropy bonus": Case("", (5, 3, 4), 97, "float32", entropy=True),
    "sequences": Case("", (5, 3, 4), 97, "float32", level="sequence"),
    "on policy": Case("", (5, 3, 4), 97, "float32", on_policy=True),
    "in place": Case("", (5, 3, 4), 97, "float32", inplace=True),
}


def batch_of(case, device):
    return bench_logits.make_batch(
        case.lengths, case.V, case.dtype, device, seed=0, on_policy=case.on_policy
    )


@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
def test_providers_have_one_loss(case, device):
    """All that run here, peers' kernels in Triton's interpreter too, agree with float64."""
    errors = bench_logits.gradient_errors(case, batch_of(case, device))
    assert list(errors) == list(case.providers)
    for name in ("fused", "eager", "float32", "trl"):
        assert errors[name] < 1e-5, (name, errors)
    if case.entropy:
        assert errors["liger"] == "not supported: no entropy bonus"
    elif case.level == "token":
        assert errors["liger"] < 1e-5 and errors["liger_inplace"] < 1e-5


@pytest.mark.parametrize("entropy", [False, True])
def test_providers_have_the_same_log_probabilities(entropy, device):
    case = Case("", (5, 3), 97, "float32", loss=False, entropy=entropy)
    errors = bench_logits.logps_errors(case, batch_of(case, device))
    assert list(errors) == list(case.providers)
    for name in ("fused", "eager", "float32", "trl"):
        assert errors[name] < 1e-5, (name, errors)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_providers_over_a_head_have_one_loss(level, device):
    names = ("fused", "eager", "float32", "trl", "trl_active")
    names += ("torch_linear", "liger_linear", "cce")
    losses = bench_linear.functions_of(names, device, level=level)
    loss = functools.partial(providers.surrogate, level=level)
    exact = functools.partial(linear_providers.exact_gradients, loss=loss)
    batch = bench_linear.make_batch((5, 3), 8, 97, "float32", device, seed=0)
    errors = bench_linear.gradient_errors(losses, batch, exact)
    assert all(errors[name] < 1e-5 for name in names[:6]), errors


def test_a_wrong_gradient_is_seen(device, monkeypatch):
    """Every case asserts the error of the first provider, ours."""
    fused = providers.fused
    monkeypatch.setattr(providers, "fused", lambda *a, **k: fused(*a, **k) * 1.001)
    case = SMALL["tokens"]
    assert bench_logits.gradient_errors(case, batch_of(case, device))["fused"] > 5e-4


def test_a_provider_that_cannot_run_has_a_reason(monkeypatch):
    """Never a number, and never an empty cell."""

    def fail():
        raise RuntimeError("first line\nsecond line")

    def outgrow():
        raise torch.OutOfMemoryError()

    def import_nothing():
        import no_such_module  # noqa: F401

    reasons = {
        fail: "failed: RuntimeError: first line",
        outgrow: "out of memory",
        import_nothing: "not installed: no_such_module",
        lambda: peers.need(False, "needs a GPU"): "not supported: needs a GPU",
    }
    for function, reason in reasons.items():
        assert record.attempt(function) == (None, reason)
    assert record.attempt(lambda: 3) == (3, None)
    with pytest.raises(RuntimeError):
        record.errors_of({"fused": 1, "peer": 2}, lambda function: fail())


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_peers_that_are_not_here(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    case = SMALL["tokens"]
    errors = bench_logits.gradient_errors(case, batch_of(case, "cpu"))
    for name in ("trl", "liger", "liger_inplace"):
        assert errors[name] == "not supported: needs a GPU"
    for name in ("quack", "fla"):
        assert errors[name].startswith(("not installed: ", "not supported: "))


def test_cases_are_distinct_and_cover_the_plan():
    for table in (cases.CPU, cases.CUDA):
        assert len({case.id for case in table}) == len(table)
        for axis in ("rows", "V"):
            assert len({case.size for case in table if case.axis == axis}) >= 4
        assert {case.level for case in table} == {"token", "sequence"}
        assert {case.loss for case in table} == {case.entropy for case in table} == {True, False}
    plain = [case for case in cases.CUDA if case.inplace]
    assert tuple(case.V for case in plain) == cases.VOCABULARIES
    assert {256, 65_536} <= {sum(case.lengths) for case in cases.CUDA}
    active = sum(cases.HALF) / (len(cases.HALF) * max(cases.HALF))
    assert active == pytest.approx(0.45, abs=0.001)


def test_compilations_are_counted():
    """Graphs; kernels would need a device."""
    torch._dynamo.reset()
    double = torch.compile(lambda x: 2 * x, dynamic=False, backend="eager")
    double(torch.ones(3))
    with measure.Compilations() as compilations:
        for size in (3, 4, 5, 4):
            double(torch.ones(size))
        assert compilations.count == 2


def test_a_length_that_compiles_again_is_seen(monkeypatch):
    batches = [bench_logits.make_batch((T,) * 2, 31, "float32", "cpu", seed=T) for T in (3, 4, 5)]
    torch._dynamo.reset()
    again = torch.compile(providers.float32, dynamic=False, backend="eager")
    assert bench_lengths.meet(again, "compiled", batches, "cpu")[1] == 2
    assert bench_lengths.meet(providers.float32, "float32", batches, "cpu")[1] == 0


def run_of(figures, name="bench.py::case", **info):
    """Results with one case, as pytest-benchmark writes them."""
    plain = {"device": "cpu", "threads": 2, "torch": "2", "triton": "3", "python": "3.11"}
    plain |= {"commit": "abc", "case": "loss, bfloat16", "active_rows": 1234, "dtype": "bfloat16"}
    plain |= {"shape": [2, 617, 32_000], "floor_ms": 2.0, "peers": {"trl": "1.16.0", "fla": None}}
    return {
        "machine_info": {"cpu": {"brand_raw": "A processor"}},
        "benchmarks": [{"fullname": name, "extra_info": plain | info | {"providers": figures}}],
    }


def test_results_survive_a_cut(tmp_path):
    """At any byte: the lines before it are read, the same as from a committed file."""
    run, file, whole = run_of({"fused": figure(1)}), tmp_path / "run.jsonl", tmp_path / "run.json"
    lines.append(file, {"machine_info": run["machine_info"]})
    for benchmark in run["benchmarks"] * 2:
        lines.append(file, benchmark)
    assert lines.read(file) == run | {"benchmarks": run["benchmarks"] * 2}
    assert report.main([str(file), "--json", str(whole)]) == 0
    assert lines.read(whole) == lines.read(file)
    written = file.read_bytes()
    for length in (len(written) - 1, len(written) - 40):
        file.write_bytes(written[:length])
        assert lines.read(file) == run


def test_a_function_that_is_no_longer_compiled_is_an_error():
    """Dynamo runs a function eagerly after so many graphs: no case may time that, or hide it."""

    def attempt(*vocabularies):
        ids, mask = torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2)
        for V in vocabularies:
            batch = (torch.randn(1, 2, V), ids, mask)
            assert record.attempt(lambda b=batch: providers.compiled_logps(*b, False))[1] is None

    with torch._dynamo.config.patch(recompile_limit=1):
        for V in (5, 6):
            with providers.fresh_compiler():
                attempt(V)
        with pytest.raises(FailOnRecompileLimitHit), providers.fresh_compiler():
            attempt(5, 6)


def test_no_git_is_no_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert measure.environment("cpu")["commit"] is None


def figure(ms, peak=10_000_000, spread=0.02):
    return {"ms": ms, "peak_bytes": peak, "spread": spread}


@pytest.mark.parametrize(
    ("old", "new", "worse"),
    [
        (figure(10), figure(10.4), False),  # within 5 %
        (figure(10), figure(10.6), True),
        (figure(10, spread=0.1), figure(11.9, spread=0.1), False),  # within both spreads
        (figure(10, spread=0.1), figure(12.1, spread=0.1), True),
        (figure(10), figure(9), False),
        (figure(10, peak=100), figure(10, peak=102), False),
        (figure(10, peak=100), figure(10, peak=103), True),
    ],
)
def test_worse_figures_are_listed(old, new, worse, tmp_path, capsys):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, ours in zip(paths, (old, new), strict=True):
        others = {"eager": figure(1000 * new["ms"] if path is paths[1] else 1), "trl": "failed: x"}
        path.write_text(json.dumps(run_of({"fused": ours, **others})))
    assert compare.main([str(path) for path in paths]) == int(worse)
    assert ("WORSE bench.py::case fused" in capsys.readouterr().out) == worse


def test_figures_without_a_spread_are_not_compared(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run_of({"fused": {"ms": 1.0, "compiled": 0}})))
    assert compare.figures(path) == {}


def test_report_shows_figures_and_reasons():
    run = run_of({"fused": figure(12.3), "eager": figure(4), "fla": "not installed: fla"})
    second = run_of({"fused": figure(5), "eager": "out of memory", "fla": "not installed: fla"})
    run["benchmarks"] += second["benchmarks"]
    text = report.render(run)
    assert "| case | active rows | V | floor ms | ours ms | eager ms | ours MB | eager MB |" in text
    assert "| loss, bfloat16 | 1,234 | 32,000 | 2.0 | 12 | 4.0 | 10 | 10 |" in text
    assert "| 5.0 | out of memory | 10 | out of memory |" in text
    assert "* fla: not installed: fla." in text and "* eager, in some cases: out of memory." in text
    assert "A processor, 2 threads" in text and "trl 1.16.0" in text and "commit abc" in text


def test_table_of_gpus_shows_what_was_measured():
    """One cell of an H200; all others are predictions, and look like it."""
    row = next(row for row in predict.ROWS if row.title == predict.IN_PLACE and row.V == 128_256)
    device = {"device": "NVIDIA H200", "case": f"{row.title}, bfloat16", "shape": [8, 1024, row.V]}
    run = run_of({"fused_inplace": figure(1.04)}, **device, active_rows=row.active)
    run["benchmarks"][0]["extra_info"]["time_over_floor"] = 1.0729
    text = report.gpu_table([run])
    assert text.count("1.04 (1.07)") == 1 and "*1.04 (1.07)*" not in text
    assert text.count(")*") == len(predict.ROWS) * len(predict.GPUS) - 1
    assert "1.04 (1.07)" not in report.gpu_table([])


def test_every_predicted_case_is_measured_on_a_gpu():
    """By the suite, under the title, vocabulary and number of active rows of the table."""
    found = {(case.title, case.V, sum(case.lengths)) for case in cases.CUDA}
    for row in predict.ROWS:
        if row.H is None:
            assert (f"{row.title}, bfloat16", row.V, row.active) in found, row
        else:
            assert (row.rows, row.H, row.V) in bench_linear.CUDA_SHAPES, row


@pytest.mark.parametrize("gpu", predict.GPUS, ids=lambda gpu: gpu.name)
def test_predictions_are_possible(gpu):
    """Nothing is faster than its floor; more columns take longer and lie closer to it."""
    in_place = [row for row in predict.ROWS if row.title == predict.IN_PLACE]
    ratios = [predict.ratio(gpu, row) for row in in_place]
    assert min(predict.ratio(gpu, row) for row in predict.ROWS) > 1
    assert ratios == sorted(ratios, reverse=True)
    assert sorted(in_place, key=lambda row: predict.seconds(gpu, row)) == in_place


def test_report_of_trainers():
    run = run_of({})
    info = run["benchmarks"][0]["extra_info"]
    del info["providers"]
    info |= {"rollout_seconds": {"fused": 3.7, "trl": 13.4}, "overhead": 0.0061}
    text = report.render(run)
    assert "### Trainers" in text and "| loss, bfloat16 | processor s |" in text
    assert "| ours | 3.7 |" in text and "| TRL | 13 |" in text
    assert "outside of generation, model, loss | 0.6% |" in text


def growing(axis, sizes, **info):
    """Cases that grow by 2 ms and 3 MB a thousand."""
    run = run_of({})
    run["benchmarks"] = []
    for size in sizes:
        figures = {"fused": figure(1 + size / 500, peak=3000 * size), "trl": "needs a GPU"}
        case = run_of(figures, axis=axis, size=size, **info)["benchmarks"][0]
        run["benchmarks"].append(case)
    return run


def test_slopes_are_fitted():
    run = growing("rows", (100, 200, 400, 800))
    run["benchmarks"] += growing("V", (1000, 2000, 4000, 8000))["benchmarks"]
    text = report.render(run)
    assert "| 1,000 more | ours ms | ours MB |" in text
    assert "| tokens | 2.0 | 3.0 |" in text and "| vocabulary | 2.0 | 3.0 |" in text


def test_pictures_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    run = growing("rows", (100, 200, 400, 800))
    for V in (8000, 16_000, 32_000, 64_000):
        case = growing("V", (V,), shape=[2, 3, V])
        run["benchmarks"] += case["benchmarks"]
    report.draw(run, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"logits-cpu.png", "floor-cpu.png"}


def test_providers_in_a_picture_look_different():
    """In colour and marker, except the two Ligers, of which a picture has one."""
    styles = {(colour, marker) for _, colour, marker in plots.STYLES.values()}
    assert len(styles) == len(plots.STYLES) - 1


def test_exactness_of_every_implementation(monkeypatch, capsys):
    """The table of docs/exactness.md, on a small head: ours alone is exact."""
    exactness = pytest.importorskip("benchmarks.exactness")
    for name, value in {"TOKENS": 8, "H": 256, "V": 300}.items():
        monkeypatch.setattr(exactness, name, value)
    for module in ("trl", "liger_kernel", "verl"):
        pytest.importorskip(module)
    exactness.main()
    lines = capsys.readouterr().out.splitlines()
    table = {line.split("|")[1].strip(): line.split("|")[2:] for line in lines if "e-0" in line}
    assert len(table) == len(exactness.ROWS)
    for name, (logp, *_) in table.items():
        assert float(logp) < 1e-5 if name == "ours" else float(logp) > 1e-3, name
    page = (exactness.ROOT / "docs" / "exactness.md").read_text()
    assert all(f"| {name} |" in page.replace("`", "") for name in map(strip, table))


def strip(name):
    return name.replace("`", "")


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_curves_of_losses(sign, monkeypatch):
    """Every objective has a panel; on policy the gradient is -A wherever the token counts."""
    monkeypatch.setattr(plot_losses, "POINTS", 31)
    panels = {type(panel.objective): panel for panel in plot_losses.PANELS}
    assert panels.keys() == {type(row.objective) for row in LOSSES.values()}
    for cls, panel in panels.items():
        ratio = plot_losses.ratios(panel)
        near = (ratio - 1).abs().argmin()
        loss, gradient = plot_losses.curve(panel, sign)
        assert loss.shape == gradient.shape == ratio.shape and gradient.isfinite().all()
        if cls not in (ClipCov, KlCov):  # they select the token there
            assert gradient[near] == pytest.approx(-sign, abs=0.05), cls


def test_curves_of_the_clip():
    panel = plot_losses.PANELS[0]
    loss, gradient = plot_losses.curve(panel, 1.0)
    ratio = plot_losses.ratios(panel)
    torch.testing.assert_close(loss, -ratio.clamp(max=1.28))
    torch.testing.assert_close(gradient, torch.where(ratio <= 1.28, -ratio, 0.0))


@pytest.mark.slow
def test_pictures_of_losses_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    plot_losses.main(tmp_path)
    for name in ("losses.png", "loss-gradients.png"):
        assert 10_000 < (tmp_path / name).stat().st_size < 250_000
