# Main commands: `make quickstart`, `make check`, `make test`. Each creates or updates .venv first.
.PHONY: quickstart baseline ablate check test test-gpu lint types format manifests doctor lock lock-gpu clean sizing \
	bench-decode bench-rollout bench-publish bench-scheduler bench-selectors bench-serve bench-viewer bench-learner

PY := .venv/bin/python
NAME ?= quickstart
ARGS ?=
export RAY_AUTH_MODE ?= disabled
# If this variable is set, every process compiles its imports again: 10 s or more per process.
unexport PYTHONDONTWRITEBYTECODE

# Train and evaluate a small agent end to end; writes runs/$(NAME)/report.html.
quickstart: .venv/.installed assets/tiny-base/model.safetensors
	$(PY) -m vz_ray.cli quickstart --name $(NAME) $(ARGS)

# Train the uniform baseline on as many samples as the agent of a finished quickstart saw.
baseline: .venv/.installed
	$(PY) -m vz_ray.cli baseline runs/$(NAME)

# Train with one part removed at a time, three seeds; two hours or more on two cores.
ablate: .venv/.installed assets/tiny-base/model.safetensors
	$(PY) -m vz_ray.cli ablate conf/ablation.yaml $(ARGS)

# The tiny model of the quickstart. It is part of the repository; this target rebuilds it if it is missing.
assets/tiny-base/model.safetensors: | .venv/.installed
	$(PY) -m vz_ray.cli base --out assets/tiny-base

# Format, lint, types, import layers, and unit tests that start no engine, cluster or browser.
UNIT_TESTS := tests/config tests/env tests/data tests/rewards tests/planning tests/utils tests/monitoring tests/test_docs.py
check: .venv/.installed lint types
	$(PY) -m pytest -q -m "not slow and not integration and not gpu" $(UNIT_TESTS) $(ARGS)

# The full suite without tests marked slow, in two processes; TEST_PROCESSES=0 runs it in one.
TEST_PROCESSES ?= 2
test: .venv/.installed lint types
	$(PY) -m pytest -n $(TEST_PROCESSES) --dist loadfile $(ARGS)

# The GPU suite; results go to runs/gpu-check.json. Needs an active environment with requirements/gpu.lock (README).
test-gpu:
	python -m pytest -m gpu $(ARGS)

lint: .venv/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports --no-logo

types: .venv/.installed
	$(PY) -m mypy

format: .venv/.installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Check k8s/ and cluster/docker/.
manifests: .venv/.installed
	$(PY) -m pytest tests/cluster/test_manifests.py tests/cluster/test_dockerfiles.py tests/k8s

# Check this machine; names a fix for each problem.
doctor: .venv/.installed
	$(PY) -m vz_ray.cli doctor

# Write the installed versions to requirements/*.lock. To change a version, install it with pip first.
lock: .venv/.installed
	$(PY) scripts/lock.py

# Resolve requirements/gpu.lock for Python 3.11 to 3.13 at the versions of cpu.lock; needs a package index, no GPU.
lock-gpu: .venv/.installed
	$(PY) scripts/lock.py --gpu

# Decode zooms and overviews of long videos; compare with decord and torchcodec (needs the system's FFmpeg).
bench-decode: .venv/.bench
	$(PY) -m benchmarks.decode $(ARGS)

# Time of a weight publish, compared with a plain copy and with the engine's own reload.
bench-publish: .venv/.installed
	$(PY) -m benchmarks.publish $(ARGS)

# Rollout throughput, compared with lockstep rounds, static shards and preloaded clips.
bench-rollout: .venv/.installed
	$(PY) -m benchmarks.rollout $(ARGS)

# Compare frame selectors at the same number of overview frames.
bench-selectors: .venv/.installed
	$(PY) -m benchmarks.frame_selectors $(ARGS)

# Load test of the server, compared with the engine without a server.
bench-serve: .venv/.installed
	$(PY) -m benchmarks.serve $(ARGS)

# Learner step with shared prefixes, compared with no sharing, padded rows and TRL.
bench-learner: .venv/.bench
	$(PY) -m benchmarks.learner $(ARGS)

# Simulate the number of engines, learner ranks and decoders.
sizing: .venv/.installed
	$(PY) -m benchmarks.sizing $(ARGS)

# Scheduling overhead: the real driver and scheduler with workers that sleep.
bench-scheduler: .venv/.installed
	$(PY) -m benchmarks.scheduler $(ARGS)

# Episode viewer on a run of 100,000 episodes.
bench-viewer: .venv/.installed
	$(PY) -m benchmarks.episode_viewer $(ARGS)

.venv/.bench: .venv/.installed
	$(PY) -m pip install --quiet --no-deps decord==0.6.0 torchcodec==0.13.0
	$(PY) -m pip install --quiet trl==1.16.0 accelerate==1.15.0 datasets==5.2.0
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache *.egg-info

.venv/.installed: scripts/install.sh pyproject.toml $(wildcard requirements/*.lock)
	sh scripts/install.sh
