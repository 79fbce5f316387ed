# make demo    set up .venv, train the embedded toy model (about two minutes), show the figures' names
# make test    set up .venv, run every test that needs no other environment
# make clean   remove the environments (runs/ stays)

PYTHON ?= python3
# The GPU set where an NVIDIA driver answers, else the CPU set; override with: make REQUIREMENTS=requirements-cpu.txt
REQUIREMENTS ?= $(if $(shell nvidia-smi -L 2>/dev/null),requirements.txt,requirements-cpu.txt)

demo: .venv/ready
	.venv/bin/python train.py

test: .venv/ready
	.venv/bin/python -m pytest -q tests

.venv/ready: $(REQUIREMENTS)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r $(REQUIREMENTS)
	touch $@

clean:
	rm -rf .venv .venv-vllm

.PHONY: demo test clean
