PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN = .venv/bin

.PHONY: install demo docs test test-slow bench clean

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

bench: install
	$(BIN)/python benchmarks/masked_relu.py
	$(BIN)/python benchmarks/snl_epoch.py
	$(BIN)/python benchmarks/mask_learning.py
	$(BIN)/python benchmarks/coordinate_descent.py
	$(BIN)/python benchmarks/objectives.py
	$(BIN)/python benchmarks/explain.py
	$(BIN)/python benchmarks/private_cost.py

clean:
	rm -rf .venv demo runs
