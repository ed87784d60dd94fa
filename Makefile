.PHONY: install test test-all lint format run bench gpu wheel

install:
	pip install -c constraints.txt -e '.[dev]'

test:
	pytest -n auto --dist loadfile

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

bench:
	python scripts/bench_clip.py --out benchmarks

gpu:
	python3 scripts/gpu_check.py --out gpu_check --minutes 9

wheel:
	python -m build --wheel
	python -m zipfile -l dist/*.whl | grep -q kernels/c/_compiled || { echo "the C files were not compiled: no C compiler?"; exit 1; }
