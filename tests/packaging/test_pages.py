"""README and docs: every Python block runs, links and tables are true, the reference is whole."""

import ast
import importlib.util
import inspect
import re
import sys
from dataclasses import fields

import pages
import pytest
import torch
import torch.distributed as dist
from pages import PAGES, ROOT

import grpo_fused

README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"


def name_of(path):
    return str(path.relative_to(ROOT))


RUNNING = [p for p in PAGES if any(b.mark in ("", "needs") for b in pages.blocks(p))]


@pytest.fixture
def one_rank():
    """A group of one process, for the page about ranks."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Runs of the trainer's pages go here, without the pictures that take longer than they do."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("grpo_fused.trainer.run.log.plot_history", lambda *arguments: b"")


@pytest.mark.parametrize("path", RUNNING, ids=name_of)
def test_every_python_block_runs(path, folder, request):
    """One after the other, in the names that they share."""
    namespace = pages.names()
    if path.name == "scaling.md":
        V, H = 50, 16
        head = {"weight_shard": torch.randn(V, H), "hidden": torch.randn(4, 8, H)}
        shards = {"group": request.getfixturevalue("one_rank"), "first_column": 0}
        namespace |= head | shards | {"logits_shard": torch.randn(4, 8, V)}
        namespace |= {"ids": namespace["completion_ids"], "mask": namespace["completion_mask"]}
    if path == DOCS / "rollouts.md":
        namespace["model"].save_pretrained("policy")
        namespace["name"] = "policy"
    ran = 0
    for block in pages.blocks(path):
        if block.mark == "needs" and importlib.util.find_spec(block.value) is None:
            continue
        if block.mark in ("", "needs"):
            pages.run(path, block, namespace)
            ran += 1
    if not ran:
        pytest.skip("its packages are not installed")


def test_few_blocks_are_exempt():
    """Every other one runs here, or in tests/integrations against a stand-in."""
    marked = [block for path in PAGES for block in pages.blocks(path) if block.mark]
    assert {block.value for block in marked if block.mark == "needs"} <= {"trl", "verl"}
    assert sum(block.mark == "not run" for block in marked) <= 2
    for path in PAGES:
        assert len(re.findall("^```python", path.read_text(), re.M)) == len(pages.blocks(path))


def test_before_and_after_are_one_loss():
    """The two blocks of the README: loss, and gradient of the model's weights."""
    before, after = pages.blocks(ROOT / "README.md")[:2]
    results = []
    for block in (before, after):
        namespace = pages.names()
        pages.run(ROOT / "README.md", block, namespace)
        loss = namespace["loss"] if block is before else namespace["out"].loss
        gradients = [p.grad.flatten() for p in namespace["model"].parameters()]
        results.append((loss.detach(), torch.cat(gradients)))
    (loss, gradient), (wanted, wanted_gradient) = results
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    error = (gradient - wanted_gradient).norm() / wanted_gradient.norm()
    assert wanted_gradient.norm() > 0.01 and error < 1e-5


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_badges_are_true():
    project = (ROOT / "pyproject.toml").read_text()
    python, torch_version = re.findall(r"badge/(?:python|torch)-([\d.]+)%2B", README)
    assert f'requires-python = ">={python}"' in project and f'"torch>={torch_version}"' in project
    assert "license-Apache--2.0" in README and 'license = "Apache-2.0"' in project
    assert f"version = {{{grpo_fused.__version__}}}" in README


def anchors(text):
    """Of the headings of a page, as GitHub and the site make them, and explicit ones."""
    headings = re.findall(r"^#+ (.*)", text, re.M)
    plain = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {*plain, *re.findall(r"^::: (.*)", text, re.M)}


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_links_lead_somewhere(path):
    """To files that exist, and to headings in them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked.read_text()), target


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    listed = re.findall(r"- (?:[^:\n]+: )?([\w/-]+\.md)$", nav, re.M)
    assert sorted(listed) == sorted(str(p.relative_to(DOCS)) for p in PAGES if DOCS in p.parents)


def test_reference_has_every_public_name():
    """And only what exists."""
    listed = set()
    for path in (DOCS / "api").glob("*.md"):
        listed |= set(re.findall(r"^::: (\S+)", path.read_text(), re.M))
    names = {f"grpo_fused.{name}" for name in grpo_fused.__all__}
    assert names <= listed
    trainer = importlib.import_module("grpo_fused.trainer").__all__
    trainer = {f"grpo_fused.trainer.{name}" for name in trainer if not name.endswith("Config")}
    assert trainer <= listed  # the settings have a page of their own
    for name in listed - names:
        module, _, attribute = name.removeprefix("kernels.").rpartition(".")
        module = f"grpo_fused.kernels.{module}" if name.startswith("kernels.") else module
        if re.search(r"\.(trl|verl)\w*$", module):  # their packages may be missing
            assert re.search(rf"^(class|def) {attribute}\b", source_of(module), re.M), name
        else:
            assert hasattr(importlib.import_module(module), attribute), name


def source_of(module):
    return ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text()


@pytest.fixture(scope="module")
def hooks():
    """The hooks of the site that need no package of it."""
    sys.path.insert(0, str(DOCS / "hooks"))
    import config_reference
    import repository_links

    yield config_reference, repository_links
    sys.path.remove(str(DOCS / "hooks"))


def test_reference_of_the_config(hooks):
    """Every field once, with its help, default, bounds and rule of resuming, in its group."""
    from grpo_fused.trainer import GRPOTrainerConfig, TrainConfig

    reference = hooks[0].reference()
    found = re.findall(r"^`(\w+)`\{ #\w+ \}\n:   (.+)\n\n    (.+)$", reference, re.M)
    texts = {name: (text, facts) for name, text, facts in found}
    assert len(found) == len(texts) == len(fields(TrainConfig))
    for this in fields(TrainConfig):
        text, facts = texts[this.name]
        assert text.replace("\\", "").lower() == f"{this.metadata['help']}.".lower()
        mutable = this.metadata["mutable_on_resume"]
        rules = {True: "may change on resume.", False: "fixed on resume."}
        wanted = rules.get(mutable, f"{mutable}.")
        assert facts.endswith(wanted), this.name
    assert "default `8`; at least 1; fixed on resume" in texts["num_generations"][1]
    assert "above 0 and at most 1;" in texts["top_p"][1]
    assert "required" in texts["model"][1]
    titles = re.findall(r"^## (.*)", reference, re.M)
    assert len(titles) > 8 and all(titles)
    groups = hooks[0].groups_of(GRPOTrainerConfig)
    assert "learning_rate" in groups["The optimizer"]
    assert sum(map(len, groups.values())) == len(fields(GRPOTrainerConfig))


def test_page_of_resuming_agrees_with_the_fields():
    """Options that it calls free, or nearly, are."""
    from grpo_fused.trainer import TrainConfig

    rules = {this.name: this.metadata["mutable_on_resume"] for this in fields(TrainConfig)}
    free, rounding, batch = re.findall(
        r"^\| (.*?) \| may change[;,]", (DOCS / "trainer" / "resume.md").read_text(), re.M
    )
    for pattern in re.findall(r"`([\w*]+)`", free):
        regex = re.compile(pattern.replace("*", r"\w+"))
        matched = [name for name in rules if regex.fullmatch(name)]
        assert matched and all(rules[name] is True for name in matched), pattern
    for name in re.findall(r"`(\w+)`", rounding + batch):
        assert isinstance(rules[name], str), name


def test_links_out_of_the_site(hooks):
    """Become addresses where the repository has one, text where not; others stay as they are."""
    replace = hooks[1].replace_links
    text = "[notes](../benchmarks/NOTES.md#a) [`x.py`](../examples/sums.py) [page](losses.md)"
    assert replace(text, "faq.md", None) == "notes `x.py` [page](losses.md)"
    url = "https://example.org/a/b"
    assert f"[notes]({url}/blob/main/benchmarks/NOTES.md#a)" in replace(text, "faq.md", url)
    inside = "[page](../losses.md)"
    assert replace(inside, "trainer/index.md", url) == inside


def test_signatures_of_the_reference(hooks):
    """Static ones have the keywords of `**options`, with the defaults that `help()` shows."""
    griffe = pytest.importorskip("griffe", reason="griffe is not installed: make docs installs it")
    import griffe_options

    package = griffe.load("grpo_fused", search_paths=[ROOT])
    griffe_options.OptionsExtension().on_package(pkg=package)
    names = {"linear_grpo_loss": "functional", "selective_log_softmax": "log_softmax"}
    for name, module in names.items():
        found = {p.name: p.default for p in package[module][name].parameters}
        wanted = inspect.signature(getattr(grpo_fused, name)).parameters
        assert list(found) == list(wanted)
        for parameter, this in wanted.items():
            if this.default is not this.empty:
                assert ast.literal_eval(str(found[parameter])) == this.default, parameter


def test_formulas_become_mathml(hooks):
    pytest.importorskip("latex2mathml", reason="not installed: make docs installs it")
    import mathml

    inline = r'<span class="arithmatex">\(\rho \lt 1\)</span>'
    text = mathml.to_mathml(inline + r'<div class="arithmatex">\[\frac{a}{b}\]</div>')
    assert "arithmatex" not in text and 'display="block"><mrow><mfrac>' in text
    for formula in re.findall(r"\$\$(.+?)\$\$", (DOCS / "losses.md").read_text(), re.S):
        assert "\\" not in mathml.to_mathml(rf'<div class="arithmatex">\[{formula}\]</div>')
