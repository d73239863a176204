# Each target sets up all it needs on a machine with only Python (once: again when the files that say what to
# install change) and prints every command it runs. Another Python: make train PYTHON=python3.12

PYTHON ?= python3

.PHONY: train test slow check clean

train: .venv/installed
	.venv/bin/foveal train dqn --env-id CartPole-v1 --total-steps 50000 --seed 1

test: .venv/installed
	.venv/bin/python -m pytest -n auto --dist worksteal

slow: .venv/installed
	.venv/bin/python -m pytest -m slow

check: .venv/installed
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("foveal needs Python 3.11 or newer, this is %s; name one: make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -c 'import importlib.util as u; u.find_spec("venv") and u.find_spec("ensurepip") or exit("foveal needs the venv module of Python: apt-get install python3-venv on Debian")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt -e '.[all,dev]'
	touch .venv/installed

# Leaves results/ alone.
clean:
	rm -rf .venv build dist foveal.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
