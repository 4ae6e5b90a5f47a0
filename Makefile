# The book's commands. `make` alone lists them. GNU make 3.81 (macOS) and later.
PYTHON ?= python3
JOBS ?= 2
CHAPTERS ?=
PROCESSORS ?=
TORCH ?=

BIN := .venv/bin
READY := .venv/ready
SITE := _build/html/ready
SITE_SOURCES := _config.yml _toc.yml pyproject.toml $(wildcard book/*.ipynb book/*.md book/*.bib book/_ext/*.py gpt3lib/*.py) \
	$(shell find book/_static -type f)

# One thread: more of them change the seventh digit of a sum, and tiny models do not run faster on two.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help book test test-elsewhere test-parallel test-torch lab export execute form check race clean
.DEFAULT_GOAL := help

help:
	@echo "make book            build the site and print its address"
	@echo "make test            build the site, run every test and every notebook, compare their outputs"
	@echo "make test-elsewhere  every notebook as three other processors would run it, on 1, 2 and 4 threads; half an hour"
	@echo "make test-parallel   every layout of 2 and 4 ranks, ten kills, nine traces; its result goes to data/experiments"
	@echo "make test-torch      the library's tests on another torch, in an environment of its own: TORCH=2.8.0"
	@echo "make lab             open the chapters in JupyterLab"
	@echo "make export          write gpt3lib/ from the chapters' exported cells"
	@echo "make execute         run the chapters and store their outputs; CHAPTERS=\"04_attention\" runs some"
	@echo "make form            measure every chapter: words, lines, widths; say which limit is broken; CHAPTERS=… as above"
	@echo "make check           style, gpt3lib in step with the chapters, form of the notebooks: seconds"
	@echo "make race            gpt3lib beside transformers and plain PyTorch: speed and memory; PARTS=\"step decode\" runs some"
	@echo "make clean           remove the environment and everything that was built"
	@echo "Each makes its environment in .venv when it is missing or out of date. PYTHON=… picks the Python (3.11 or later)."

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "The book needs Python 3.11 or later; '$(PYTHON)' is not. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "==> environment: the pinned packages go into .venv (the first time some minutes, and 2.4 GB: 7 with CUDA)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[book,test]'
	@touch $@

$(SITE): $(READY) $(SITE_SOURCES)
	@echo "==> site: building, warnings are errors"
	@rm -rf _build
	@$(BIN)/jupyter-book build . -W -n --keep-going -q > .venv/book.log 2>&1 && rm .venv/book.log || \
		{ cat .venv/book.log; rm -f .venv/book.log $@; exit 1; }
	@touch $@

book: $(SITE)
	@echo "==> the book: file://$(CURDIR)/_build/html/index.html"

test: $(SITE)
	@echo "==> tests, and every notebook once more"
	@$(BIN)/python -m pytest -n $(JOBS) --durations=8

# PROCESSORS="avx2" picks some
test-elsewhere: $(READY)
	@echo "==> every notebook as other processors would run it"
	@$(BIN)/python tools/elsewhere.py --jobs $(JOBS) $(PROCESSORS)

test-parallel: $(READY)
	@echo "==> every layout of 2 and 4 ranks, ten kills, nine traces"
	@$(BIN)/python tools/measure_parallel.py

# a test file for each module; stored outputs show the digits of the pinned torch, so chapters are not compared
LIBRARY_TESTS := $(wildcard $(patsubst gpt3lib/%.py,tests/test_%.py,$(wildcard gpt3lib/*.py)))
OTHER := .venv-torch-$(TORCH)

test-torch:
	@test -n "$(TORCH)" || { echo "Which torch? Try: make test-torch TORCH=2.8.0"; exit 1; }
	@echo "==> environment: torch $(TORCH) and the pinned packages go into $(OTHER)"
	@test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	@grep -v '^torch==' constraints.txt > $(OTHER)/constraints.txt
	@$(OTHER)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OTHER)/constraints.txt \
		-e '.[book,test]' torch==$(TORCH)
	@echo "==> the library's tests on torch $(TORCH)"
	@$(OTHER)/bin/python -m pytest -q -n $(JOBS) $(LIBRARY_TESTS)

lab: $(READY)
	@echo "==> JupyterLab on the chapters; Ctrl-C ends it"
	@$(BIN)/jupyter lab book

export: $(READY)
	@echo "==> export: gpt3lib from the chapters"
	@$(BIN)/python tools/export.py

execute: $(READY)
	@echo "==> execute: running the chapters and storing their outputs"
	@$(BIN)/python tools/execute.py $(CHAPTERS)

form: $(READY)
	@echo "==> form: every chapter measured"
	@$(BIN)/python tools/form.py $(CHAPTERS)

check: $(READY)
	@echo "==> style"
	@$(BIN)/ruff check --quiet gpt3lib tools benchmarks tests book conftest.py
	@$(BIN)/ruff format --quiet --check gpt3lib tools benchmarks tests book conftest.py
	@echo "==> gpt3lib in step with the chapters"
	@$(BIN)/python tools/export.py --check
	@echo "==> form of the notebooks"
	@$(BIN)/python -m pytest -q tests/test_book.py tests/test_book_form.py

# every core, unlike the tests: that is how a model is used
race: $(READY)
	@echo "==> race: medians of runs that take turns; close what else is running"
	@env -u OMP_NUM_THREADS $(BIN)/python benchmarks/race.py $(PARTS)

clean:
	rm -rf .venv .venv-torch-* _build build *.egg-info .pytest_cache .ruff_cache .hypothesis
