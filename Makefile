# `make demo` and `make test` need nothing but Python >= 3.11 and the network for pip. On a machine whose cores are busy:
# `make demo OPTIONS="--threads 1"`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The tests run over our own plug-ins too.
PLUGINS := $(sort $(wildcard plugins/*/setup.cfg))

.PHONY: demo test test-quick lint docs results install clean

demo: $(VENV)/.installed
	$(BIN)/bbmoe attack --model pmoe --trigger warp --applicator patch $(OPTIONS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadgroup --max-worker-restart 0

# The first case of every test that is not slow, see tests/quick.py: every room in two to three minutes on two cores.
test-quick: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m quick -n 2 --dist loadgroup --max-worker-restart 0

# Import circles: tests/test_imports.py; the order of the rooms: lint-imports.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_imports.py

# Warnings are errors (not with --quiet, which would not count them); the site is docs/site/index.html.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/mkdocs.yml
	@! grep -rE --include='*.html' '(src|<link[^>]*href)="(https?:)?//' docs/site || { echo 'the site asks other hosts'; exit 1; }

# Tables, plots and pages under benchmarks/results and the marked tables of README and documentation, from the committed records.
results: $(VENV)/.installed-test
	$(BIN)/python benchmarks/redraw.py

install: $(VENV)/.installed

# The stamp files depend on setup.cfg, which has the dependencies and the entry points.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.installed-test: setup.cfg $(PLUGINS) $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e '.[test]' $(patsubst %/setup.cfg,-e ./%,$(PLUGINS))
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: setup.cfg $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e '.[test,dev]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: setup.cfg $(VENV)/bin/python
	$(BIN)/python -m pip install -q -e '.[docs]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist docs/site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
