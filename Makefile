# Every target sets up .venv by itself: `make demo` and `make test` are all that a machine needs.
PYTHON ?= python3
BIN := .venv/bin
DEVICE = $(shell $(BIN)/python -c "import torch; print(torch.cuda.get_device_name().replace(' ', '-') if torch.cuda.is_available() else 'cpu')")

.PHONY: demo test mutate bench aot lint clean

demo: .venv/ready
	$(BIN)/grpo-fused demo --output-dir runs/demo

test: .venv/ready
	$(BIN)/python -m pytest -n $(if $(filter cpu,$(DEVICE)),auto,0)

mutate: .venv/ready
	$(BIN)/python tests/mutate.py

bench: .venv/ready
	$(BIN)/python -m pytest benchmarks --benchmark-json benchmarks/results/$(DEVICE).json
	$(BIN)/python -m benchmarks.report benchmarks/results/$(DEVICE).json

aot: .venv/ready
	$(BIN)/python -m benchmarks.aot

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build dist *.egg-info runs

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,parity,lint]"
	touch $@
