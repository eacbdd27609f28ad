# Everything a newcomer or CI needs; the environment is made once and again when its pins change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test test-ray test-rest test-slow chaos lint clean

# Trains on the embedded digits, sweeps, samples, and prints the path of the report page.
quickstart: $(STAMP)
	@$(BIN)/mdt-ray quickstart digits

# Two halves side by side: the tests that start Ray, which wait for its processes much of their time, and all others.
test: $(STAMP)
	@echo "Some ten minutes; what the tests print comes when they are done"
	@$(MAKE) --no-print-directory --jobs 2 --keep-going --output-sync=target test-ray test-rest

test-ray test-rest: $(STAMP)
	$(BIN)/python -m pytest -m "$(if $(findstring ray,$@),ray,not ray) and not slow and not gpu"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Every job RUNS times over several hosts, with a fault each time; the last line has the figures. Two hours as it stands.
RUNS ?= 25
chaos: $(STAMP)
	$(BIN)/python -m tests.chaos.chaos --runs $(RUNS)

lint: $(STAMP)
	$(BIN)/ruff check .

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python >= 3.11 is needed; name one with: make PYTHON=python3.11"; exit 1; }
	@echo "Making $(VENV): some minutes, of which pip says nothing"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,assets]"
	@touch $(STAMP)

clean:
	rm -rf $(VENV) runs
