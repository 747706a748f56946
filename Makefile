# The interpreter: PYTHON=... chooses another one; anything from 3.11 on will do.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$python" && break; done)
BIN := .venv/bin
INSTALL := -m pip --disable-pip-version-check --no-input -qq install
PIP := $(BIN)/python $(INSTALL)
BENCH_PIP := .venv-bench/bin/python $(INSTALL)
LOCKS := requirements.lock requirements-dev.lock requirements-bench.lock deploy/requirements.lock
OSV_URL ?= https://api.osv.dev/v1/query

.DEFAULT_GOAL := help
.PHONY: help same-python install demo test test-extended e2e interop chaos bench bench-scale check dev lock audit clean

help: ## Show these targets.
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 18

install: .venv/installed ## Make .venv with the locked versions.

demo: .venv/installed ## Run the job on a generated platform and show the result.
	@$(BIN)/tutormax demo

dev: .venv/installed ## Start the Dagster UI on http://127.0.0.1:3000.
	@$(BIN)/tutormax dev

test: .venv/installed-dev ## Run the tests.
	@$(BIN)/python -m pytest -n 3 --dist loadgroup -m "not extended" $(PYTEST)

test-extended: .venv/installed-dev ## Run the tests of Dask clusters, benchmarks and chaos.
	@$(BIN)/python -m pytest -n 3 --dist loadgroup -m extended $(PYTEST)

e2e: .venv/installed-dev ## Use the Dagster UI in a real browser; installs Debian's Chromium if there is none.
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { \
		apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || { \
		echo "Chromium is missing and could not be installed. As root: apt-get install chromium" >&2; exit 1; }
	@$(BIN)/python -m pytest e2e $(PYTEST)

interop: .venv/installed-dev ## Run the job on servers as people run them; installs Debian's PostgreSQL, PgBouncer and Prometheus.
	@{ ls /usr/lib/postgresql/*/bin/initdb || command -v initdb; } >/dev/null 2>&1 \
		&& { command -v pgbouncer || ls /usr/sbin/pgbouncer; } >/dev/null 2>&1 \
		&& command -v promtool >/dev/null && command -v prometheus-pushgateway >/dev/null \
		&& command -v prometheus-node-exporter >/dev/null || { \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql \
		pgbouncer prometheus prometheus-pushgateway prometheus-node-exporter >/dev/null; } || { \
		echo "PostgreSQL, PgBouncer or Prometheus is missing and could not be installed. As root: apt-get install" \
		"postgresql pgbouncer prometheus prometheus-pushgateway prometheus-node-exporter" >&2; exit 1; }
	@$(BIN)/python -m pytest interop -n 2 $(PYTEST)

chaos: .venv/installed-dev ## Break the product on purpose for about half an hour and show what was lost.
	@$(BIN)/python -m chaos $(CHAOS)

bench: .venv-bench/installed ## Measure the product against other ways to its rows, in about twenty minutes.
	@.venv-bench/bin/python -m benchmarks $(or $(BENCH),all)

bench-scale: .venv-bench/installed .venv/installed-dev ## Measure one process against Dask workers, in about ten minutes.
	@.venv-bench/bin/python -m benchmarks.scale $(BENCH)

check: .venv/installed-dev ## Lint, format, imports between rooms and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy

lock: .venv/installed-dev ## Choose versions anew from pyproject.toml.
	$(BIN)/uv pip compile pyproject.toml --group build --universal --generate-hashes --no-header --no-strip-extras \
		--upgrade --quiet --output-file requirements.lock
	$(BIN)/uv pip compile pyproject.toml --group dev --universal --generate-hashes --no-header --no-strip-extras \
		--upgrade --quiet --constraint requirements.lock --output-file requirements-dev.lock
	$(BIN)/uv pip compile pyproject.toml --group dev --group bench --universal --generate-hashes --no-header \
		--no-strip-extras --upgrade --quiet --constraint requirements-dev.lock --output-file requirements-bench.lock
	$(BIN)/uv pip compile pyproject.toml --group build --extra postgres-instance --extra kubernetes --extra s3 --extra gcs \
		--extra dask --universal --generate-hashes --no-header --no-strip-extras \
		--upgrade --quiet --constraint requirements.lock --output-file deploy/requirements.lock

audit: .venv/installed-dev ## Ask osv.dev for known vulnerabilities of the locked versions.
	@said=$$($(BIN)/pip-audit --disable-pip --require-hashes --strict --progress-spinner off \
		--vulnerability-service osv --osv-url $(OSV_URL) $(addprefix --requirement ,$(LOCKS)) 2>&1) \
		&& echo "$$said" || { case "$$said" in \
		*requests.exceptions.*|*ConnectionError*) echo "Nothing was audited: $(OSV_URL) cannot be reached, or does not \
	answer as it should. Try again, or name a mirror of it: make audit OSV_URL=..." ;; \
		*) echo "$$said" ;; esac >&2; exit 1; }

clean: ## Remove .venv and .tutormax; the embedded server is stopped first.
	@if [ -x $(BIN)/tutormax ]; then $(BIN)/tutormax db stop || true; fi
	rm -rf .venv .venv-bench .tutormax

.venv/bin/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python >= 3.11 was found. Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; fi
	@$(PYTHON) -m venv --clear .venv || { rm -rf .venv; \
		echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

# An interpreter that is named must be the one that made .venv, which would be used in its place.
same-python: | .venv/bin/python
ifneq ($(filter command environment,$(origin PYTHON)),)
	@which='import sys; print(sys.base_prefix, sys.version)'; \
	if [ "$$($(PYTHON) -c "$$which")" != "$$($(BIN)/python -c "$$which")" ]; then \
		echo "PYTHON is $(PYTHON), but another interpreter made .venv: $$($(BIN)/python -c \
	'import sys; print(sys.base_prefix, sys.version.split()[0])'). Remove .venv to use this one: rm -rf .venv" >&2; exit 1; fi
endif

# A stamp is written last, so an installation that was interrupted is done again.
.venv/installed: requirements.lock pyproject.toml setup.py | .venv/bin/python same-python
	@echo "Installing into .venv (once; about a minute)"
	@$(PIP) --require-hashes --requirement requirements.lock
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

.venv/installed-dev: requirements-dev.lock .venv/installed
	@echo "Installing the tools for tests and checks"
	@$(PIP) --require-hashes --requirement requirements-dev.lock
	@touch $@

# Of their own: the database driver imports pandas and pyarrow where it finds them.
.venv-bench/installed: requirements-bench.lock .venv/installed
	@echo "Installing what the product is measured against into .venv-bench"
	@$(BIN)/python -m venv --clear .venv-bench
	@$(BENCH_PIP) --require-hashes --requirement requirements.lock
	@$(BENCH_PIP) --require-hashes --requirement requirements-bench.lock
	@$(BENCH_PIP) --no-deps --no-build-isolation --editable .
	@touch $@
