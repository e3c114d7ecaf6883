PYTHON ?= python3
RUNS ?= runs/demo
DOORS ?= runs/doors
TRIALS ?= 12
VENV := .venv
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
NOTEBOOKS = $(wildcard notebooks/*.ipynb)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo doors test test-slow lint docs lab venv constraints clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | while IFS='	' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.installed ## train a first sweep on the embedded text, with its frontier so far, then its table and frontier
	@echo 'training $(TRIALS) small models into $(RUNS); $(RUNS)/frontier.png is drawn as soon as three have ended, and again later'
	$(BIN)/explore sweep sweeps/first_frontier.py --runs $(RUNS) --trials $(TRIALS)
	$(BIN)/explore table $(RUNS)
	$(BIN)/explore plot $(RUNS)

doors: $(VENV)/.installed-dev ## train a LatentMoE with multi-token prediction, and generate the same text with transformers
	$(BIN)/explore train sweeps/examples/latent_moe_mtp.json --runs $(DOORS)
	$(BIN)/explore parity $(DOORS)/latent-moe-mtp-*
	$(BIN)/explore eval $(DOORS)/latent-moe-mtp-* --acceptance 8

test: $(VENV)/.installed-dev ## run the fast tests
	$(PYTEST) -n 2

test-slow: $(VENV)/.installed-dev ## run the slow tests, and the GPU tests where there is a GPU
	UNCHECKED=1 $(PYTEST) -n 2 --dist worksteal -m "(slow or gpu) and not alone"
	UNCHECKED=1 $(PYTEST) -m alone

lint: $(VENV)/.installed-dev ## check format, style, types, imports between packages, stripped notebooks, and figures against their records
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(if $(NOTEBOOKS),$(BIN)/nbstripout --verify $(NOTEBOOKS))
	$(BIN)/explore figures --check

docs: $(VENV)/.installed-dev ## build the pages into build/docs; a broken link, or a figure that is not drawn, is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo 'open build/docs/index.html'

lab: $(VENV)/.installed ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

venv: $(VENV)/.installed-dev ## make the environment with all that tests and pages need

constraints: ## write constraints.txt from a fresh environment, keeping the torch it names
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && set -e && \
	$(PYTHON) -m venv "$$fresh" && \
	"$$fresh/bin/python" -m pip install "$$(grep '^torch==' constraints.txt)" -e '.[dev,docs]' && \
	{ head -n 1 constraints.txt; "$$fresh/bin/python" -m pip freeze --all --exclude-editable | grep -v '^pip==' | sed 's/+[^+]*$$//'; } \
	  > "$$fresh/constraints.txt" && \
	cp "$$fresh/constraints.txt" constraints.txt

clean: ## remove the environment, builds and caches; runs stay
	rm -rf $(VENV) build dist *.egg-info .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find explore kernels sweeps tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written only after its command succeeded, so that whatever was interrupted is done again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is missing or older than 3.11; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.created
	@echo 'installing PyTorch, Lightning, Optuna, JupyterLab and what they need into $(VENV): one to three minutes, once only'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

# The development environment contains the other: both stamps, or `make demo` would install once more.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.created
	@echo 'installing PyTorch, Lightning, Optuna, JupyterLab and what tests and pages need into $(VENV): two to four minutes, once only'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs]'
	@touch $(VENV)/.installed $@
