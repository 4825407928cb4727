# Targets: make setup | demo | test | test-portable | test-cluster | test-vllm | test-embed | test-eval | lint | fuzz | bench | gate | gpu | clean
PYTHON ?= python3
# Exactly this version: a range would let pip take a CUDA build of several gigabytes on a machine without a GPU.
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN     = $(VENV)/bin
# A new folder every time: nothing that an earlier demo wrote is overwritten.
OUT    ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
JOBS   ?= $(shell env -u OMP_NUM_THREADS nproc)

.PHONY: setup demo test test-portable test-cluster test-vllm test-embed test-embed-trl test-embed-verl test-embed-swift
.PHONY: test-eval lint fuzz bench gate gpu clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e '.[train,dev]'
	touch $@

demo: setup
	$(BIN)/prism-fast demo --out $(OUT)

# Slow tests start first (tests/conftest.py); a worker that is done takes over what another has left.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test: setup
	$(PYTEST)

# The numerical tests again, as other CPUs would compute: narrower vectors, other products. Each in processes of its own.
OTHER_CPUS = ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=COMPATIBLE
test-portable: setup
	@failed=; for cpu in $(OTHER_CPUS); do \
	  echo "=== $$cpu"; \
	  env $$cpu $(PYTEST) -q -rfE -m numerical || failed="$$failed $$cpu"; \
	done; \
	if [ -n "$$failed" ]; then echo "test-portable: failed under$$failed"; exit 1; fi; \
	echo "test-portable: passed under $(OTHER_CPUS)"

# Every form of sharding against one process, in every stage and awkward case, with every fault put in: some 20 minutes.
# The short ones, which `make test` has too, are among them.
test-cluster: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'cluster or not cluster' --timeout 1800 tests/cluster

# Rollouts by vLLM on a CPU, in an environment of their own beside the other (dev/vllm_environment.py): some 5 minutes
# to build and 3.5 GB, then 5 to 25. The figures go into REPORT too.
VLLM_VENV ?= .venv-vllm
REPORT    ?= runs/test-vllm.md
test-vllm: $(VLLM_VENV)/.ready
	OMP_NUM_THREADS=1 PRISM_REPORT=$(REPORT) $(VLLM_VENV)/bin/python -m pytest -m vllm --timeout 1800 tests/vllm

SHARED_STEPS = pyproject.toml dev/environments.py dev/torchvision_schemas.py
$(VLLM_VENV)/.ready: dev/vllm_environment.py $(SHARED_STEPS)
	$(PYTHON) -m dev.vllm_environment $(VLLM_VENV)
	touch $@

# The kernels inside other trainers on a CPU, each in an environment of its own: some 2 to 4 minutes to build, then 2 to 8.
# verl's trainer is tested with the discriminator of TRL's environment, as its own cannot hold prism_fast.
EMBED_VENV   ?= .venv-embed
EMBED_REPORT ?= runs/test-embed.md
test-embed: test-embed-trl test-embed-verl test-embed-swift

test-embed-trl: $(EMBED_VENV)/trl/.ready
	OMP_NUM_THREADS=1 PRISM_REPORT=$(EMBED_REPORT) $(EMBED_VENV)/trl/bin/python -m pytest -m embed --timeout 1800 tests/embed

test-embed-verl: $(EMBED_VENV)/verl/.ready $(EMBED_VENV)/trl/.ready
	OMP_NUM_THREADS=1 PRISM_REPORT=$(EMBED_REPORT:.md=-verl.md) PRISM_JUDGE_PYTHON=$(EMBED_VENV)/trl/bin/python \
		$(EMBED_VENV)/verl/bin/python -m pytest -m embed --timeout 1800 tests/embed/verl

test-embed-swift: $(EMBED_VENV)/swift/.ready
	OMP_NUM_THREADS=1 PRISM_REPORT=$(EMBED_REPORT:.md=-swift.md) \
		$(EMBED_VENV)/swift/bin/python -m pytest -m embed --timeout 1800 tests/embed/ms_swift

$(EMBED_VENV)/%/.ready: dev/embed_environment.py $(SHARED_STEPS)
	$(PYTHON) -m dev.embed_environment $* $(EMBED_VENV)/$*
	touch $@

# `prism-fast eval --lmms` with the real lmms-eval on a CPU, in an environment of its own: some 4 minutes to build, then 5.
EVAL_VENV   ?= .venv-eval
EVAL_REPORT ?= runs/test-eval.md
test-eval: $(EVAL_VENV)/.ready
	OMP_NUM_THREADS=1 PRISM_REPORT=$(EVAL_REPORT) $(EVAL_VENV)/bin/python -m pytest -m eval --timeout 1800 tests/eval

$(EVAL_VENV)/.ready: dev/eval_environment.py $(SHARED_STEPS)
	$(PYTHON) -m dev.eval_environment $(EVAL_VENV)
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/hadolint Dockerfile

# Damaged inputs by the thousand (COUNT= of every format), and the C++ under libFuzzer and sanitizers for MINUTES: each
# script fails where an input is neither read nor refused in one line. COUNT=200 MINUTES=1 takes some 5 minutes.
COUNT   ?=
MINUTES ?= 10
fuzz: setup
	for script in files images packing; do \
	  OMP_NUM_THREADS=1 $(BIN)/python -m dev.fuzz_$$script $(if $(COUNT),--count $(COUNT)) || exit 1; done
	OMP_NUM_THREADS=1 $(BIN)/python dev/fuzz_models.py $(COUNT)
	$(BIN)/python -m dev.fuzz_native --minutes $(MINUTES)

# make bench OP=linear_logprob ARGS="--peers liger --plot head.png"
OP     ?= linear_logprob
bench: setup
	$(BIN)/python -m benchmarks $(OP) $(ARGS)

# Every Triton kernel in every production configuration, for GPUs that need not be here.
gate: setup
	env -u TRITON_INTERPRET $(BIN)/python -m prism_kernels.compile_gate --all $(ARGS)

# On a machine with an NVIDIA GPU: its own Python with its own torch; what it lacks comes from .whl (python -m
# benchmarks.gpu.wheels .whl) and goes aside. PART=first, checks or speed: ten minutes each; PART=linear,tests for some.
gpu:
	$(PYTHON) -m benchmarks.gpu $(if $(PART),--part $(PART)) $(ARGS)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(EMBED_VENV) $(EVAL_VENV) build dist *.egg-info kernels/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f kernels/prism_kernels/_C*.so
