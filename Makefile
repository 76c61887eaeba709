# make demo   sets up everything, runs the main job on shipped music, prints the path of a listening page
# make test   sets up everything, runs formatter, linter, type checker and tests
#
# Needs Python 3.11 or 3.12 and the Python package index. Set-up happens once, and again when the pins change.

SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
PINS := pyproject.toml constraints-py3.11.txt constraints-py3.12.txt
CODE := subtractive_jax data_pipeline configs launch
INSTALL = $(PYTHON) -m pip install --quiet --disable-pip-version-check \
	-c constraints-py$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt

.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	rm -rf demo
	$(PYTHON) -m launch.demo --output=demo

test: $(VENV)/test.stamp
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy $(CODE)
	$(PYTHON) -m pytest -m "not slow" -n 2 --dist=loadfile --no-loadscope-reorder

clean:
	rm -rf $(VENV) demo

$(VENV)/demo.stamp: $(PINS)
	@python=""; for name in python3.11 python3.12 python3 python; do \
	  $$name -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	    && python=$$name && break; \
	done; \
	[ -n "$$python" ] || { echo "error: no Python 3.11 or 3.12 with venv on the PATH: install one" >&2; exit 1; }; \
	echo "Setting up $(VENV) with $$python: some minutes, once" && $$python -m venv --clear $(VENV)
	$(INSTALL) -e '.[pipeline]'
	$(INSTALL) --no-deps musicnn==0.1.0  # trained weights in a wheel; its own requirements are from 2019
	$(PYTHON) -m launch.convert --from=musicnn
	@touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(INSTALL) -e '.[pipeline,test]'
	@touch $@
