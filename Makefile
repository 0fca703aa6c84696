# Everything runs in .venv, which the first target that needs it makes from nothing.
PYTHON ?= python3
BASE ?=
SEED ?= 0
OUT ?= runs/ppo
BIN := .venv/bin
PIP := pip install --quiet --disable-pip-version-check
# Otherwise each of the many interpreters that the tests start compiles the project again.
unexport PYTHONDONTWRITEBYTECODE
# The tests of a file share what takes long to make: one process runs them all, slow files first (tests/conftest.py).
BY_FILE := --dist loadscope --no-loadscope-reorder

.PHONY: help app-test pictures demo test test-oldest test-newest families common-tests launches check docs bench bench-ppo ppo-evidence matrix \
	audit-power compare-trl faults fuzz quantised sweeps release-hashes wheel clean ppo
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-14s %s\n", $$1, $$2}'

.venv/.done: setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/$(PIP) -c constraints.txt torch
	$(BIN)/$(PIP) -c constraints.txt -e '.[dev]'
	$(BIN)/$(PIP) -c constraints.txt --no-deps --upgrade --target .venv/torchao torchao
	@touch $@

demo: .venv/.done  ## from a GPT-2 checkpoint to a loaded package and a picture; BASE=openai-community/gpt2 or a folder
	$(BIN)/python examples/demo.py $(if $(BASE),--base "$(BASE)")

ppo: .venv/.done  ## PPO on the demo's model and a sentiment lexicon, with a figure; SEED=0 OUT=runs/ppo
	$(BIN)/python examples/ppo.py --out "$(OUT)" --seed $(SEED)

test: .venv/.done  ## the test suite
	$(BIN)/python -m pytest -q -n auto $(BY_FILE)

.oldest/.done: setup.cfg pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .oldest
	.oldest/bin/$(PIP) -c constraints-oldest.txt torch
	.oldest/bin/$(PIP) -c constraints-oldest.txt -e '.[test]'
	.oldest/bin/$(PIP) -c constraints.txt --no-deps --upgrade --target .oldest/torchao torchao
	@touch $@

test-oldest: .oldest/.done  ## the test suite on the oldest versions that setup.cfg allows (slow)
	.oldest/bin/python -m pytest -q -n auto $(BY_FILE)

.newest/.done: setup.cfg pyproject.toml
	$(PYTHON) -m venv --clear .newest
	.newest/bin/$(PIP) torch==2.13.0
	.newest/bin/$(PIP) torch==2.13.0 -e '.[test,app]'
	.newest/bin/$(PIP) --no-deps --upgrade --target .newest/torchao torchao
	@touch $@

test-newest:  ## the test suite on what pip resolves today, in an environment made anew (slow)
	rm -f .newest/.done
	@$(MAKE) .newest/.done
	.newest/bin/python -m pytest -q -n auto $(BY_FILE)

check: .venv/.done  ## lint, format, types, who imports whom, and whether the API reference builds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/reference.py

docs: .venv/.done  ## build the API reference from the docstrings, in build/docs
	$(BIN)/python docs/reference.py

bench: .venv/.done  ## speed and memory, side by side; writes docs/benchmarks.md (slow)
	$(BIN)/python benchmarks/page.py

bench-ppo: .venv/.done .trl/.done  ## one PPO iteration of gpt2_value.ppo and of TRL 1.12.0: seconds and memory (slow)
	$(BIN)/python benchmarks/ppo.py

ppo-evidence: .venv/.done .trl/.done  ## the tables and figures of docs/ppo.md: seeds, kills, critics, TRL's curves (an hour)
	$(BIN)/python benchmarks/learning.py
	$(BIN)/python tests/slow/kill_ppo.py --out runs/kills
	$(BIN)/python benchmarks/critic.py ways
	$(BIN)/python benchmarks/critic.py starts
	.trl/bin/python benchmarks/trl_task.py train
	$(BIN)/python benchmarks/trl_task.py draw

matrix: .venv/.done  ## packages saved and loaded across transformers 4.57.6, 5.0.0, 5.23.0 and the newest (slow)
	$(BIN)/python tests/matrix/run.py

families: .venv/.done  ## every causal language model of transformers that builds small: right, or refused by name (slow)
	$(BIN)/python tests/slow/families.py

common-tests: .venv/.done  ## transformers' own common tests, on GPT2ValueModel and on GPT2LMHeadModel
	$(BIN)/python tests/slow/common_tests.py

launches: .venv/.done  ## every accelerate launch line of docs/many-gpus.md, with two processes (slow)
	$(BIN)/python tests/slow/launches.py

.trl/.done:
	$(PYTHON) -m venv .trl
	.trl/bin/$(PIP) -c constraints.txt torch trl==1.12.0 peft transformers vaderSentiment
	@touch $@

compare-trl: .venv/.done .trl/.done  ## checkpoints, PPO and an exported critic against TRL 1.12.0 itself (slow)
	rm -rf .trl/checkpoints .trl/ppo
	.trl/bin/python tests/slow/compare_with_trl.py write .trl/checkpoints
	$(BIN)/python tests/slow/compare_with_trl.py compare .trl/checkpoints
	$(BIN)/python tests/slow/compare_ppo_with_trl.py export .trl/ppo
	.trl/bin/python tests/slow/compare_ppo_with_trl.py write .trl/ppo
	$(BIN)/python tests/slow/compare_ppo_with_trl.py compare .trl/ppo

pictures: demo  ## the README's pictures, from the demo's page and the app in a headless Chromium
	$(BIN)/python docs/pictures.py

app-test: .venv/.done  ## the app and strangers' pages in a headless Chromium; screenshots in runs/app
	$(BIN)/python -m pytest -q tests/slow/app_in_browser.py

audit-power: .venv/.done  ## dishonest samplers that the audit catches, honest ones that it does not pass (slow)
	$(BIN)/python tests/slow/audit_power.py

quantised: .venv/.done  ## models whose weights torchao has quantised
	PYTHONPATH=.venv/torchao $(BIN)/python -m pytest -q tests/slow/quantised.py

sweeps: faults fuzz quantised families common-tests launches audit-power app-test matrix  ## faults, fuzz, quantised, families, common-tests, launches, audit-power, app-test, matrix

faults: .venv/.done  ## fail every request of a push in every way; prints request x fault -> outcome
	$(BIN)/python tests/slow/fault_sweep.py

fuzz: .venv/.done  ## spoil packages, checkpoints and adapters in thousands of ways; prints mutation x outcome
	$(BIN)/python tests/slow/fuzz_packages.py
	$(BIN)/python tests/slow/fuzz_checkpoints.py

release-hashes: .venv/.done  ## add this version's code to the list of releases, before it is released
	PYTHONPATH=. $(BIN)/python .ci/release_hashes.py

wheel:  ## build dist/*.whl
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

clean:  ## remove what the targets above made
	rm -rf .venv .oldest .newest .matrix .trl build dist demo runs *.egg-info
