PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN = .venv/bin
# Tests that between them call every dependency.
LOWEST = tests/test_package.py tests/test_cli.py tests/test_io.py tests/test_loggers.py tests/test_masking.py tests/test_report.py \
	tests/audit tests/data tests/linearize/test_snl.py tests/objectives tests/private/test_export.py tests/ranks/test_launch.py \
	tests/report/test_card.py tests/study/test_study.py tests/weights

.PHONY: install demo docs test test-slow dist test-dist test-lowest bench clean

install: .venv/.installed

# torch first and pinned: a later resolution would otherwise pull its CUDA build.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs,hub,mlflow,mpc,multi,onnx,ray,tensorboard,wandb]'
	touch $@

demo: install
	$(BIN)/fairline demo --out demo
	@echo "Open demo/report.html in a browser."

docs: install
	$(BIN)/python docs/site/build.py build/site
	@echo "Open build/site/index.html in a browser."

test: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest -n 2 --dist loadfile -m 'not slow'

test-slow: install
	$(BIN)/pytest -m slow

# PIP_CONSTRAINT pins what the build itself installs.
dist: install
	rm -rf dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

test-dist: dist
	FAIRLINE_DIST=$(CURDIR)/dist $(BIN)/pytest tests/test_dist.py

# Warnings are no errors here: old packages warn of what newer ones have mended.
test-lowest:
	rm -rf .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt torch
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt \
		-e '.[hub,mlflow,multi,onnx,ray,tensorboard,wandb]' pytest hypothesis onnxruntime
	.venv-lowest/bin/pytest -m 'not slow' -W default $(LOWEST)

bench: install
	$(BIN)/python benchmarks/masked_relu.py
	$(BIN)/python benchmarks/snl_epoch.py
	$(BIN)/python benchmarks/mask_learning.py
	$(BIN)/python benchmarks/coordinate_descent.py
	$(BIN)/python benchmarks/objectives.py
	$(BIN)/python benchmarks/explain.py
	$(BIN)/python benchmarks/private_cost.py

clean:
	rm -rf .venv .venv-lowest demo dist runs
