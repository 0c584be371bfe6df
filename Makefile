SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo run phone beauty ablate serve mlflow test slurm lint clean

BIN := .venv/bin

# The launcher takes every GPU. Without one, two ranks of one thread each. A port of its own lets two runs share a machine.
RANKS ?= 2
DEEPSPEED := $(BIN)/deepspeed --log_level error --master_port $$((20000 + RANDOM % 10000))
ifeq ($(shell nvidia-smi -L 2>/dev/null | grep -c ^GPU),0)
  DEEPSPEED := DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(DEEPSPEED) --num_accelerators $(RANKS)
endif

# Its command returns 0 when a part of it is killed: what a stage was to write is looked at before the next one.
MADE := $(BIN)/python -m contract.made --since $(shell date +%s)

# Threads that wait sleep rather than spin: beside another run on the same cores spinning made stages several times slower.
export OMP_WAIT_POLICY ?= passive

# For a log of megabytes the JVM's second compiler costs more than it gives. SPARK= says what else spark-submit is to do.
SPARK ?= --driver-java-options -XX:TieredStopAtLevel=1

# Experiment 1 is the first of a store, "colarec" unless tracking.experiment says otherwise.
MLFLOW_PAGE := http://127.0.0.1:5000/\#/experiments/1/runs?workflowType=machine_learning

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

setup: .venv/.complete  ## create .venv (PYTHON=, EXTRAS=: see setup.sh); the other targets do it when needed

.venv/.complete: pyproject.toml constraints.txt setup.sh etl/setup_spark.py
	@./setup.sh

demo: setup  ## the whole pipeline on generated data, in some minutes
	$(BIN)/python etl/generate.py data/demo --force
	@$(MAKE) --no-print-directory run CONFIG=configs/demo.toml

run: setup  ## the four stages: make run CONFIG=configs/phone.toml ARGS="--train.epochs=1"
	@[ "$(CONFIG)" ] || { echo "error: say which experiment: make run CONFIG=configs/phone.toml" >&2; exit 2; }
	$(BIN)/spark-submit $(SPARK) etl/build.py --config $(CONFIG) $(ARGS)
	$(BIN)/python gid/build.py --config $(CONFIG) $(ARGS)
	$(DEEPSPEED) trainer/main.py --config $(CONFIG) $(ARGS)
	@$(MADE) model --config $(CONFIG) $(ARGS)
	$(DEEPSPEED) eval/main.py --config $(CONFIG) $(ARGS)
	@$(MADE) eval --config $(CONFIG) $(ARGS)
	@echo "Compare runs in MLflow: make mlflow, then open $(MLFLOW_PAGE)"

phone:  ## Amazon Cell Phones, see configs/phone.toml
	@$(MAKE) --no-print-directory run CONFIG=configs/phone.toml

beauty:  ## Amazon Beauty, see configs/beauty.toml
	@$(MAKE) --no-print-directory run CONFIG=configs/beauty.toml

ablate: setup  ## the paper's ablations: make ablate CONFIG=configs/demo.toml ARGS="--only=no_distil,gid_random"
	@[ "$(CONFIG)" ] || { echo "error: say which experiment: make ablate CONFIG=configs/demo.toml" >&2; exit 2; }
	$(BIN)/python eval/ablate.py --config $(CONFIG) --launcher "$(DEEPSPEED)" $(ARGS)

serve: setup  ## log, register and serve a trained model over HTTP: make serve CONFIG=configs/demo.toml
	@[ "$(CONFIG)" ] || { echo "error: say which experiment: make serve CONFIG=configs/demo.toml" >&2; exit 2; }
	$(BIN)/python eval/serving.py --config $(CONFIG) --port 5001 $(ARGS)

mlflow: setup  ## MLflow on the runs of this machine
	@echo "open $(MLFLOW_PAGE)"
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db --workers 1

test: setup  ## the tests that need no GPU and no SLURM
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not slurm and not gpu" $(ARGS)

slurm: setup  ## the tests on a SLURM cluster, see docs/cluster.md
	$(BIN)/python -m pytest -m slurm tests/cluster $(ARGS)

lint: setup  ## the linter and the formatter's check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@if command -v shellcheck >/dev/null; then shellcheck -x cluster/*.sh cluster/*.sbatch; fi

clean:  ## remove the demo's data and run, and caches; other runs and .venv stay
	rm -rf data/demo runs/demo spark-warehouse metastore_db .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
