# make lab, make test: one command each, the set-up included.
# Whatever needs .venv depends on .venv/.ready, so setup.sh runs when that is missing or stale only.

PYTHON_BIN = .venv/bin/python
FIRST = notebooks/01_architecture.ipynb
# Jupyter refuses to run as root unless told to; in a container root is often the only user.
AS_ROOT = $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: help lab test notebooks bench peers reliability cluster fuzz lint pins clean

help:
	@echo "make lab        opens JupyterLab on the first notebook (ARGS=... for JupyterLab)"
	@echo "make test       checks the style, runs every test and every notebook (ARGS=... for pytest)"
	@echo "make notebooks  executes all notebooks in order and writes them back executed"
	@echo "make bench      measures the ladder of servers, draws imgs/ladder.png (ARGS=... names rungs)"
	@echo "make peers      measures other servers beside ours, in an environment of their own"
	@echo "make reliability  does to servers under load what production will (ARGS=... names trials)"
	@echo "make cluster    does to a cluster of several nodes what a network will (ARGS=... names trials)"
	@echo "make fuzz       sends both servers 12,500 malformed and odd requests each"
	@echo "make lint       checks the style only"
	@echo "make pins       brings requirements.txt up to date with the newest packages"
	@echo "make clean      leaves the clone as it was: removes .venv, .venv-peers, .uv and caches"
	@echo "Each sets up .venv first, where it is missing or stale."

.venv/.ready: setup.sh requirements.txt pyproject.toml
	@sh setup.sh

# An address, not a file name: JupyterLab would show nothing outside the folder of that file.
lab: .venv/.ready
	@echo "lab: JupyterLab opens in your browser, or at the address below; Ctrl-C twice ends it"
	@.venv/bin/jupyter lab $(AS_ROOT) --LabApp.default_url=/lab/tree/$(FIRST) $(ARGS)

# Most tests wait for servers to start, so two files of them run at a time, in the order of their
# names; those that measure come after them, alone. 5: ARGS chose no test of that kind.
test: lint
	@echo "test: every test and notebook"
	@$(PYTHON_BIN) -m pytest -m "not alone" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS); most=$$?; \
		$(PYTHON_BIN) -m pytest -m alone $(ARGS); alone=$$?; \
		case $$most$$alone in 00 | 05 | 50) ;; *) exit 1 ;; esac

lint: .venv/.ready
	@echo "lint: ruff"
	@$(PYTHON_BIN) -m ruff check
	@$(PYTHON_BIN) -m ruff format --check

notebooks: .venv/.ready
	@echo "notebooks: executing them in order"
	@$(PYTHON_BIN) notebooks/execute.py $(ARGS)

bench: .venv/.ready
	@echo "bench: measuring; leave the machine to it, for about 20 minutes"
	@$(PYTHON_BIN) -m model.bench.ladder $(ARGS)

.venv-peers/.ready: .venv/.ready model/bench/peers/setup.sh model/bench/peers/requirements.txt
	@sh model/bench/peers/setup.sh

peers: .venv-peers/.ready
	@echo "peers: measuring; leave the machine to it, for about 10 minutes"
	@$(PYTHON_BIN) -m model.bench.ladder --peers $(ARGS)

reliability: .venv/.ready
	@echo "reliability: leave the machine to it, for about 10 minutes"
	@$(PYTHON_BIN) -m model.bench.reliability $(ARGS)

cluster: .venv/.ready
	@echo "cluster: leave the machine to it, for about 9 minutes"
	@$(PYTHON_BIN) -m model.bench.cluster $(ARGS)

fuzz: .venv/.ready
	@echo "fuzz: about 10 minutes"
	@for server in kserve_server ray_server; do \
		$(PYTHON_BIN) -m model.bench.fuzz model.$$server $(ARGS) || exit; done

# The CUDA packages stay out: torch pins its own, and a CPU torch asks for none.
# --no-config, so that every machine writes the same pins. By way of a file in .venv, so that a
# failure leaves the old ones.
pins: .venv/.ready
	@echo "pins: resolving pyproject.toml for every platform and Python"
	@unset UV_TORCH_BACKEND; PATH="$$PATH:$(CURDIR)/.uv/bin" uv pip compile pyproject.toml \
		--no-config --universal --upgrade --python $(PYTHON_BIN) \
		--quiet --no-header --no-annotate --output-file .venv/pins.txt
	@grep -v -E '^(nvidia-|cuda-|triton==)' .venv/pins.txt > requirements.txt
	@echo "pins: requirements.txt is written; the next make installs it"

clean:
	@echo "clean: removing .venv, .venv-peers, .uv and caches"
	@rm -rf .venv .venv-peers .uv .pytest_cache .ruff_cache
	@find . -name .git -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune \
		-exec rm -rf {} +
