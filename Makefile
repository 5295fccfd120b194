# Two commands: `make demo` and `make test`. Both install what they need into .venv first.
# PYTHON may name another interpreter (3.11 or newer); torch is pinned so that every machine runs the same build.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
TEST_WORKERS ?= 2
CLAIMS := tests/unit/test_sparse_toys.py tests/unit/test_late_interaction_claims.py tests/parity/test_evaluation_anchors.py

.PHONY: demo test test-integrations test-claims lint install install-test install-integrations clean

demo: install
	$(BIN)/openembed demo --out demo-output

test: install-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS)

# Databases and frameworks by their installed packages; a PostgreSQL server with pgvector is named by OPENEMBED_POSTGRES.
test-integrations: install-integrations
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/integrations

# Claims that take training or the data of OPENEMBED_SHARED: minutes each.
test-claims: install-test
	OPENEMBED_SLOW=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -n $(TEST_WORKERS) --dist loadfile $(CLAIMS)

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/installed
install-test: $(VENV)/installed-test
install-integrations: $(VENV)/installed-integrations

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit('openembed needs Python 3.11 or newer') if sys.version_info < (3, 11) else None"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[serve]"
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

$(VENV)/installed-integrations: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[integrations]"
	touch $@

clean:
	rm -rf $(VENV) demo-output runs
