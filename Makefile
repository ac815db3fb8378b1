# Every target works on a fresh clone: it makes .venv and installs what it needs first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PROMPT ?= a red circle moving left on black
# Where torch comes from. Empty means: decided by a probe of a few seconds (see `torch-index`).
TORCH_INDEX ?=
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo app test test-slow lint format bench ci-setup apt-install clean

demo: $(VENV)/.ready
	$(BIN)/pointillist generate "$(PROMPT)" --compare --output outputs/demo.mp4

app: $(VENV)/.ready
	$(BIN)/python app.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/embedded.py

# What the tests need beyond Python and make: a C++ compiler, and a browser for those of the web UI.
ci-setup:
	@command -v c++ >/dev/null || $(MAKE) -s apt-install PACKAGE=g++
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
	  || $(MAKE) -s apt-install PACKAGE=chromium

apt-install:
	@[ "$$(id -u)" = 0 ] || { echo "needed: apt install $(PACKAGE)"; exit 1; }
	@apt-get update -qq && apt-get install -y -qq $(PACKAGE) >/dev/null

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed; $(PYTHON) is {sys.version.split()[0]}. Set PYTHON=/path/to/python3.11")'
	@echo "== creating $(VENV) and installing torch (a few minutes on a new machine)"
	$(PYTHON) -m venv $(VENV)
	@index="$(TORCH_INDEX)"; \
	if [ -n "$$index" ]; then echo "== torch from $$index (TORCH_INDEX)"; \
	elif [ "$$(uname -s)" != Linux ]; then echo "== torch from PyPI (not Linux: its build there has no CUDA packages)"; \
	elif command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then echo "== torch from PyPI (an NVIDIA GPU is here)"; \
	elif $(PYTHON) -c 'import urllib.request as r; r.urlopen("$(CPU_INDEX)/torch/", timeout=4)' 2>/dev/null; then \
	  index=$(CPU_INDEX); echo "== torch from $$index (no NVIDIA GPU: the CPU build)"; \
	else echo "== torch from PyPI (no NVIDIA GPU, but $(CPU_INDEX) did not answer within 4 s)"; fi; \
	install="$(BIN)/pip install -q --disable-pip-version-check --no-deps -c constraints.txt torch"; \
	if [ -n "$$index" ] && ! $$install --index-url $$index; then \
	  echo "== $$index has no such torch: from PyPI instead"; $$install; \
	elif [ -z "$$index" ]; then $$install; fi
	@touch $@

$(VENV)/.ready: $(VENV)/.torch pyproject.toml
	@echo "== installing pointillist"
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[web,search,metrics]'
	@touch $@

$(VENV)/.dev: $(VENV)/.ready
	@echo "== installing the development tools"
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[web,search,metrics,dev]'
	@touch $@
