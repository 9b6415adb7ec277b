# make lab, make test: one command each, the set-up included.
# Whatever needs .venv depends on .venv/.ready, so setup.sh runs only when that is missing or stale.

PYTHON_BIN = .venv/bin/python
FIRST = notebooks/01_architecture.ipynb
# Jupyter refuses to run as root unless told to; in a container root is often the only user.
AS_ROOT = $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: help lab check test test-long notebooks bench against pays peers overhead reliability cluster capacity fuzz lint pins site clean

help:
	@echo "make lab         opens JupyterLab on the first notebook (ARGS=... for JupyterLab)"
	@echo "make check       says whether the course can run on this machine, in under a minute"
	@echo "make test        runs make lint, the tests and every notebook (ARGS=... for pytest)"
	@echo "make test-long   runs the longer tests: faults, clusters, containers, load, exercises"
	@echo "make notebooks   executes all notebooks in order and writes them back executed"
	@echo "make bench       measures the ladder of configurations, draws imgs/ladder.png (ARGS=... names some)"
	@echo "make against     measures this commit's server beside another's (ARGS=COMMIT ...)"
	@echo "make pays        measures which server pays for which model, draws imgs/pays.png"
	@echo "make peers       measures other servers beside ours, in environments of their own"
	@echo "make overhead    measures what each way to a model costs, draws imgs/overhead.png"
	@echo "make reliability injects faults into servers under load (ARGS=... names experiments)"
	@echo "make cluster     injects faults into a cluster of several nodes (ARGS=... names experiments)"
	@echo "make capacity    compares predicted with measured loads, draws imgs/capacity.png"
	@echo "make fuzz        sends malformed and unusual requests to both servers"
	@echo "make lint        checks style, formatting and which part of model/ imports which"
	@echo "make pins        updates requirements.txt to the newest packages (ARGS=... for uv)"
	@echo "make site        builds the course as web pages, in .site/html"
	@echo "make clean       removes .venv, .venv-peers, .uv, .site and caches"
	@echo "Each sets up .venv first, if it is missing or stale."

.venv/.ready: setup.sh requirements.txt pyproject.toml
	@sh setup.sh

# An address, not a file name: JupyterLab would show nothing outside the folder of that file.
lab: .venv/.ready
	@echo "lab: JupyterLab opens in your browser, or at the address below; Ctrl-C twice ends it"
	@.venv/bin/jupyter lab $(AS_ROOT) --LabApp.default_url=/lab/tree/$(FIRST) $(ARGS)

check: .venv/.ready
	@$(PYTHON_BIN) -m model.course.environment

# Tests wait for servers to start much of the time, so several units of them run at a time
# (tests/conftest.py says what a unit is). On two cores two are best for those of make test, three
# for the longer ones, which wait more.
UNITS = --dist loadfile --no-loadscope-reorder

test: lint
	@echo "test: tests and notebooks; make test-long has the rest"
	@$(PYTHON_BIN) -m pytest -m "not long" -n 2 $(UNITS) $(ARGS)

# Those that measure come last, alone. 5: ARGS selected no test of that phase.
test-long: .venv/.ready
	@echo "test-long: the longer tests; leave the machine to them"
	@$(PYTHON_BIN) -m pytest -m "long and not alone" -n 3 $(UNITS) $(ARGS); most=$$?; \
		$(PYTHON_BIN) -m pytest -m "long and alone" $(ARGS); alone=$$?; \
		case $$most$$alone in 00 | 05 | 50) ;; *) exit 1 ;; esac

lint: .venv/.ready
	@echo "lint: ruff, import-linter"
	@$(PYTHON_BIN) -m ruff check
	@$(PYTHON_BIN) -m ruff format --check
	@.venv/bin/lint-imports --no-logo --no-cache

notebooks: .venv/.ready
	@echo "notebooks: executing them in order"
	@$(PYTHON_BIN) -m model.course.execute $(ARGS)

bench: .venv/.ready
	@echo "bench: measuring; leave the machine to it, for about 20 minutes"
	@$(PYTHON_BIN) -m model.loadtest.ladder $(ARGS)

pays: .venv/.ready
	@echo "pays: measuring; leave the machine to it, for about 16 minutes"
	@$(PYTHON_BIN) -m model.loadtest.pays $(ARGS)

against: .venv/.ready
	@echo "against: measuring; leave the machine to it, for about 10 minutes"
	@$(PYTHON_BIN) -m model.loadtest.against $(ARGS)

peers: .venv/.ready
	@sh model/loadtest/peers/setup.sh
	@echo "peers: measuring; leave the machine to it, for about 15 minutes, or 30 with bfloat16"
	@$(PYTHON_BIN) -m model.loadtest.ladder --peers $(ARGS)

overhead: .venv/.ready
	@sh model/loadtest/peers/setup.sh litserve
	@echo "overhead: measuring; leave the machine to it, for about 20 minutes"
	@$(PYTHON_BIN) -m model.loadtest.overhead $(ARGS)

reliability: .venv/.ready
	@echo "reliability: leave the machine to it, for about 10 minutes"
	@$(PYTHON_BIN) -m model.faults.experiments $(ARGS)

cluster: .venv/.ready
	@echo "cluster: leave the machine to it, for about 9 minutes"
	@$(PYTHON_BIN) -m model.faults.cluster $(ARGS)

capacity: .venv/.ready
	@echo "capacity: leave the machine to it, for about 5 minutes"
	@$(PYTHON_BIN) -m model.capacity.validation $(ARGS)

fuzz: .venv/.ready
	@echo "fuzz: about 10 minutes"
	@$(PYTHON_BIN) -m tests.fuzz $(ARGS)

# The CUDA packages stay out: torch pins its own, and a CPU torch asks for none.
# --no-config, so that every machine writes the same pins. By way of a file in .venv, so that a
# failure leaves the old ones.
pins: .venv/.ready
	@echo "pins: resolving pyproject.toml, with all its groups, for every platform and Python"
	@unset UV_TORCH_BACKEND; PATH="$$PATH:$(CURDIR)/.uv/bin" uv pip compile pyproject.toml $(ARGS) \
		--all-extras --no-config --universal --upgrade --python $(PYTHON_BIN) \
		--quiet --no-header --no-annotate --output-file .venv/pins.txt
	@grep -v -E '^(nvidia-|cuda-|triton==)' .venv/pins.txt > requirements.txt
	@echo "pins: requirements.txt is written; the next make installs it"

# Warnings are errors: a link that leads nowhere ends it. The pages have a folder of their own in
# SITE, as myst-nb writes a copy of the notebooks beside it.
SITE = .site

site: .venv/.ready
	@echo "site: building $(SITE)/html/README.html from README, docs and the committed notebooks"
	@$(PYTHON_BIN) -m sphinx -W --keep-going -q -c docs/site -d $(SITE)/doctrees . $(SITE)/html

clean:
	@echo "clean: removing .venv, .venv-peers, .uv, .site and caches"
	@rm -rf .venv .venv-peers .uv .site .pytest_cache .ruff_cache
	@find . -name .git -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune \
		-exec rm -rf {} +
