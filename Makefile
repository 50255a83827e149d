# Every target makes .venv itself when it is not there; nothing needs to be installed first but Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The stamp is renewed when the dependencies change.
INSTALLED := $(VENV)/.installed
# An environment over it for ExecuTorch and Core ML: they bring torchao, which every process that imports diffusers
# would load as well.
DEVICES := .venv-devices
WITH_DEVICES := $(DEVICES)/.installed
# The versions that the tests passed with; make CONSTRAINTS= takes the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt

.DEFAULT_GOAL := help
# Warnings and progress bars name folders of the machine, and are nobody's result.
define WITHOUT_STDERR
import sys, nbformat
for path in sys.argv[1:]:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    nbformat.write(notebook, path)
endef
export WITHOUT_STDERR

.PHONY: help install demo transformer test test-long test-devices lint format bench families notebooks constraints audit faults

help:
	@echo "make install    .venv with prune-lab and everything to develop it"
	@echo "make demo       the whole job on the shipped reference model; ends with a report (about ten minutes on 2 cores)"
	@echo "make transformer  the same for the shipped transformer, with controls (ten minutes on 2 cores)"
	@echo "make test       the tests (under twelve minutes on 2 cores)"
	@echo "make test-long  the slow and rare tests that make test leaves out: kills, several processes, Ray, notebooks"
	@echo "make test-devices  the tests of ExecuTorch and Core ML, in an environment of their own"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff mend what it can"
	@echo "make bench      the benchmarks"
	@echo "make families   the tests that say what works with which class of models; their table in the README"
	@echo "make notebooks  execute the notebooks in place"
	@echo "make constraints  install the newest versions, test them, and pin them in constraints.txt"
	@echo "make faults     a campaign that damages, kills and starves; N=1000 cases, KINDS=..., HOURS=..., SEED=..."
	@echo "make audit      look up the pinned versions in the lists of known vulnerabilities"

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; say which one with: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix --constraint ,$(CONSTRAINTS)) \
		-e '.[dev,notebooks]'
	@touch $@

$(WITH_DEVICES): $(INSTALLED) .ci/constraints_devices.txt
	test -x $(DEVICES)/bin/python || $(BIN)/python -m venv $(DEVICES)
	.ci/over.sh $(BIN)/python $(DEVICES)/bin/python
	$(DEVICES)/bin/python -m pip install --quiet --disable-pip-version-check \
		$(addprefix --constraint ,$(CONSTRAINTS)) --constraint .ci/constraints_devices.txt -e '.[executorch,coreml]'
	@touch $@

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/prune-lab run --config prune_lab/demo.toml --run runs/demo
	@echo "report: $(CURDIR)/runs/demo/report/index.html"

transformer: $(INSTALLED)
	$(BIN)/python -m recipes.transformer_model study --work runs/transformer --out runs/transformer/report
	@echo "report: $(CURDIR)/runs/transformer/run/report/index.html"

# Options of pytest: make test PYTEST_OPTIONS="-k losses"
PYTEST_OPTIONS ?=

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not long" $(PYTEST_OPTIONS)

test-long: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m long $(PYTEST_OPTIONS)

test-devices: $(WITH_DEVICES)
	$(DEVICES)/bin/python -m pytest -n 2 --dist worksteal tests/test_edge_devices.py $(PYTEST_OPTIONS)

# A campaign of faults: its journal and tables lie in FAULTS_OUT, and the same command again goes on.
N ?= 1000
KINDS ?=
HOURS ?=
SEED ?=
FAULTS_OUT ?= runs/faults

faults: $(INSTALLED)
	$(BIN)/python -m tests.faults --n $(N) --out $(FAULTS_OUT) \
		$(addprefix --hours ,$(HOURS)) $(addprefix --seed ,$(SEED)) $(if $(KINDS),--kinds $(KINDS))

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

families: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal --seen=new

notebooks: $(INSTALLED)
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb
	$(BIN)/python -c "$$WITHOUT_STDERR" notebooks/*.ipynb

# torch stays where it is: newer ones are another matter, tried by hand.
constraints:
	rm -rf .venv-newest
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=.ci/newest.txt
	.venv-newest/bin/python .ci/constraints.py > constraints.txt

audit:
	test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit \
		&& .venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit; } \
		|| { echo "not checked: pip-audit could not be installed"; exit 0; }
	! test -x .venv-audit/bin/pip-audit || .venv-audit/bin/python .ci/audit.py constraints.txt
