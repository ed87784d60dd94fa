.PHONY: install test test-all lint format run wheel

install:
	pip install -c constraints.txt -e '.[dev]'

test:
	pytest

test-all:
	pytest -m ""

lint:
	ruff check .
	ruff format --check .
	mypy
	lint-imports

format:
	ruff check --fix .
	ruff format .

run:
	accelerate launch scripts/finetune.py --clip adaptive

wheel:
	python -m build --wheel
