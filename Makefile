# `make demo` and `make test` are the README's two commands. Each builds the environment first, in .venv of this
# folder, and uses it again until its pinned requirements change.
SHELL := /bin/bash
VENV ?= .venv
TYPES := build/types

.PHONY: demo test lint matrix environment clean

demo: environment
	@$(VENV)/bin/python examples/demo.py $(ARGS)

test: lint
	@$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Every CPU row of the support table, each in an environment of its own; ARGS="--ci --jobs 2": the oldest, one of each
# era, the newest, two at a time.
matrix: environment
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/nox -R -s matrix -- $(ARGS)

# Type checkers see patches/ and compat/ as sub-packages only where they lie as they are installed.
lint: environment
	@$(VENV)/bin/ruff check .
	@rm -rf $(TYPES) && mkdir -p $(TYPES) && cp -r patchfastrl $(TYPES)/ && cp -r patches compat $(TYPES)/patchfastrl/
	@cd $(TYPES) && "$(abspath $(VENV))/bin/mypy" --config-file ../../pyproject.toml --cache-dir ../mypy -p patchfastrl

environment:
	@scripts/environment.sh $(VENV)

clean:
	rm -rf $(VENV) build patchfastrl.egg-info .pytest_cache .ruff_cache
