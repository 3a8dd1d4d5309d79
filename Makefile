# `make` alone lists the targets. Everything runs in .venv, which `make install` makes by itself.
PYTHON ?= python3
AUDIO ?= samples/lecture.flac
# What is said in AUDIO, a .txt or .json; without one there is no word error rate.
TRUTH ?= $(if $(filter samples/%,$(AUDIO)),samples/samples.json)
MODEL ?= demo
VENV := .venv
BIN := $(VENV)/bin
# What a transcript needs, and what tests and benchmark need besides.
INSTALLED := $(VENV)/.installed
DEVELOPED := $(VENV)/.developed
PIP = $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable

.DEFAULT_GOAL := help
.PHONY: help install run demo parity faults benchmark test check clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | expand -t 12

install: $(DEVELOPED) ## the environment in .venv, with the tested versions of everything

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(PIP) .
	@touch $@

$(DEVELOPED): $(INSTALLED)
	$(PIP) '.[dev]'
	@touch $@

run: $(INSTALLED) ## transcribe: make run AUDIO=speech.mp3 MODEL=tiny
	@$(BIN)/python -m encoder.run --model '$(MODEL)' --verbose True $(if $(TRUTH),--truth '$(TRUTH)') '$(AUDIO)'

demo: $(INSTALLED) ## the variants one after another in the terminal: make demo AUDIO=speech.mp3 MODEL=tiny
	@$(BIN)/python -m validation demo --model '$(MODEL)' $(if $(filter file,$(origin AUDIO)),,$(if $(TRUTH),--truth '$(TRUTH)') '$(AUDIO)')

parity: $(INSTALLED) ## is the encoder OpenAI's, tap by tap: make parity AUDIO=speech.mp3 MODEL=tiny
	@$(BIN)/python -m validation parity --model '$(MODEL)' '$(AUDIO)'

faults: $(INSTALLED) ## what mistakes cost in words, the short form: about twenty faults, three recordings
	@$(BIN)/python -m validation faults --short --restart --model '$(MODEL)'

benchmark: $(DEVELOPED) ## all variants and peers, timed side by side, most of an hour, into build/: make benchmark MODEL=tiny.en
	@mkdir -p build
	@$(BIN)/python -m validation benchmark --model '$(MODEL)' --json build/benchmark.json --markdown build/benchmark.md --svg build/benchmark.svg $(if $(filter file,$(origin AUDIO)),,$(if $(TRUTH),--truth '$(TRUTH)') '$(AUDIO)')

test: check ## ruff, mypy and all tests
	$(BIN)/python -m pytest

check: $(DEVELOPED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean: ## remove .venv and the tools' caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
