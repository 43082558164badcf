# make demo    convert a sample model at 4 bits on average and compare it with the original
# make test    run the tests; brings four older releases of ONNX Runtime for them, some 70 MB
# make quick   the tests of the parts alone, without whole conversions: under three minutes
# make lint    ruff, then mypy on the package
#
# Each sets up .venv first, once. Paths are relative and programs run as
# modules, so that the folder may stand anywhere, spaces included.

PYTHON ?= $(or $(shell command -v python3 2>/dev/null),python)
RUN := .venv/bin/python -m

# Older releases of ONNX Runtime that the tests load files in, each in a folder of its own.
RUNTIMES := $(addprefix .venv/onnxruntime/,1.17.3 1.20.1 1.23.2 1.24.4)

.PHONY: demo test quick lint
.DELETE_ON_ERROR:

demo: .venv/installed
	mkdir -p build
	$(RUN) onnx_attnround models/digits_resnet.onnx build/digits_resnet.int.onnx \
		--calib models/digits_calib.npz --eval models/digits_eval.npz --mean-bits 4

test: .venv/installed $(RUNTIMES)
	$(RUN) pytest

quick: .venv/installed
	$(RUN) pytest -m "not slow"

lint: .venv/installed
	$(RUN) ruff check .
	$(RUN) mypy --strict onnx_attnround

# torch goes first and by itself, so that a local build of the pinned version,
# where pip has one at hand, is preferred to the index's.
.venv/installed: pyproject.toml constraints.txt
	"$(PYTHON)" -m venv .venv
	$(RUN) pip install -q -c constraints.txt torch
	$(RUN) pip install -q -c constraints.txt -e ".[dev]"
	touch .venv/installed

# The folder stays empty where pip has no such release for this Python; then its tests skip.
$(RUNTIMES): .venv/installed
	mkdir -p $@
	-$(RUN) pip install -q --no-deps --upgrade --target $@ \
		onnxruntime==$(@F) $(if $(filter 1.17.3,$(@F)),"numpy<2")
	touch $@
