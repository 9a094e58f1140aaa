# Each target makes its own environment first; all they need is Python 3.11, make and a package index.
# More arguments: make demo ARGS="--headless --json", make test ARGS="-k lifecycle"
ARGS ?=
SEEDS ?= 30
STEPS ?= 100000
PYTHON := .venv/bin/python

.PHONY: help env demo test check e2e bench bench-check soak simulate

help:
	@echo 'make demo   a 64-node cluster fills before your eyes (no cluster, no GPU)'
	@echo 'make test   every test that needs nothing else on the machine'
	@echo 'make check  the whole gate, as CI runs it'
	@echo 'make e2e    the tests against a real kube-apiserver, kube-scheduler and etcd (needs Go and etcd; GANG_KILLS=20: more kills)'
	@echo 'make bench  1,000 pods on 200 nodes of a real control plane, Tessera killed ten times'
	@echo 'make bench-check   the quick benches against bench/budgets.toml (all: ARGS=--all)'
	@echo 'make soak   30 small clusters in memory with every kind of ask, each audited (SEEDS=1000 for more)'
	@echo 'make simulate   the whole program in virtual time under faults and kills, judged at every step (STEPS=1000000 for more)'
	@echo 'make env    only the environment, in .venv'

env: .venv/.made

.venv/.made: pyproject.toml .ci/constraints.txt .ci/env
	@bash .ci/env

demo: env
	@$(PYTHON) -m scheduler demo $(ARGS)

test: env
	$(PYTHON) -m pytest -m "not controlplane" $(ARGS)

check:
	@bash .ci/run

e2e: env
	$(PYTHON) -m pytest -m controlplane $(ARGS)

bench: env
	$(PYTHON) -m bench cluster --nodes 200 --pods 1000 --seed 1 --kills 10 --dump build/bench-cluster --json $(ARGS)

bench-check: env
	@$(PYTHON) -m bench check --json $(ARGS)

soak: env
	@$(PYTHON) -m bench soak --seeds $(SEEDS) --json $(ARGS)

simulate: env
	@$(PYTHON) -m tests.simulation.simulate --steps $(STEPS) $(ARGS)
