"""The LoRA policy: load it, take log-probabilities, apply one update.

The log-probabilities are those of the distribution that was sampled, end token
included. A step divides once, by the number of its samples, so micro-batches do
not change its gradient.

Shapes: B rollouts of at most L tokens, N completion tokens, D hidden, V vocabulary.
"""

import os
import resource
import subprocess
import sys
from collections import defaultdict
from contextlib import contextmanager
from math import isfinite
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from tqdm import tqdm

import rspo
from lib.cli import digest, fail

transformers.utils.logging.disable_progress_bar()

LORA_ALPHA = 32  # the adapter's scale is alpha / rank
MAX_GRAD_NORM = 1.0
LOGITS_AT_ONCE = 2**25  # 128 MB, of learner and plain sampler
GAP_ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # nats per token
TOKENS_TO_DECIDE = 64  # whether the sampler uses the adapter


class BadNumbers(ArithmeticError):
    """A reward or the gradient is not finite. The update was not applied."""

    def __init__(self, message: str, rollout=None):
        super().__init__(message)
        self.rollout = rollout  # the one to blame, or None


class BrokenPolicy(BadNumbers):
    """The policy's probabilities are not finite: it cannot be sampled."""


# -------- load

def pick_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not hidden and subprocess.getstatusoutput("nvidia-smi -L")[0] == 0:
        fail(f"nvidia-smi sees a GPU that torch {torch.__version__} cannot use: it needs "
             "driver 580 or newer and requirements.txt (CUDA_VISIBLE_DEVICES= for the CPU)")
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(dtype: str) -> str:
    if dtype == "auto":
        return "bfloat16" if pick_device() == "cuda" else "float32"
    return dtype


def peak_memory_gb() -> float:
    """Peak memory so far of the GPU, or without one of the process, in GiB."""
    unit = 1 if sys.platform == "darwin" else 2**10
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit  # bytes
    return (torch.cuda.max_memory_allocated() or resident) / 2**30


@contextmanager
def loading(base: str):
    """What the libraries raise for a missing or broken model, in a sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        fail(f"no room for {base} on the GPU: end what else is on it "
             "(nvidia-smi lists it), or take --load-in-4bit")
    except Exception as error:  # a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        what = "folder" if Path(base).is_dir() else "hub model"
        fail(f"the {what} {base} could not be loaded ({reason.rstrip('.')}); without "
             "internet, give a folder with config, tokenizer and *.safetensors")


def load_model(base: str, adapter=None, dtype="auto", device=None, load_in_4bit=False):
    """(model, tokenizer) of a folder or hub id, with the adapter if given.

    No dropout, no code of the checkpoint. 4 bits: NF4 (QLoRA, arXiv 2305.14314).
    """
    device, how = device or pick_device(), {"trust_remote_code": False}
    dtype, quantised = getattr(torch, pick_dtype(dtype)), {}
    if load_in_4bit:
        nf4 = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
        quantised = {"device_map": {"": device}, "quantization_config": nf4}
    with loading(base):
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, **how)
        if not tokenizer("1 + 1", add_special_tokens=False).input_ids:
            raise ValueError("it has no tokenizer files")  # one was made up
        config = transformers.AutoConfig.from_pretrained(base, **how)
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            base, config=config, dtype=dtype, use_safetensors=True,
            output_loading_info=True, **how, **quantised)
        if info["missing_keys"]:  # they were filled with random numbers
            raise ValueError(f"its weights lack {min(info['missing_keys'])}")
        model = model if load_in_4bit else model.to(device)
    model.requires_grad_(False)
    if adapter is not None:
        with loading(str(adapter)):
            model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return prepare(model), tokenizer


def write_dequantised(base: str, dtype: str, folder: str) -> None:
    """Write, for vLLM, the base that a 4-bit learner computes with."""
    model, tokenizer = load_model(base, dtype=dtype, load_in_4bit=True)
    model.dequantize().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def add_lora(model, rank: int, seed: int) -> PeftModel:
    """The model with a fresh float32 adapter; its second factor is 0."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=LORA_ALPHA, lora_dropout=0.0,
                        target_modules="all-linear", task_type="CAUSAL_LM")
    try:
        return prepare(get_peft_model(model, config))
    except ValueError as error:  # Mamba, for one
        kind, reason = model.config.model_type, str(error).splitlines()[0][:200]
        fail(f"PEFT puts no adapter on layers of {kind} models ({reason})")


class LoraLinear(lora.Linear):
    """PEFT's layer, x W^T + s (x A^T) B^T, that makes one result in place of four.

    The large product comes last, so that recomputing activations can leave it out
    where no more than its input is needed.
    """

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return super().forward(x)
        [name], base = self.active_adapters, self.base_layer
        A, B = self.lora_A[name].weight, self.lora_B[name].weight  # (r, in), (out, r)
        flat = x.flatten(0, -2).to(base.weight.dtype)  # (T, in)
        small = flat @ A.T * self.scaling[name]  # (T, r)
        B = B.T.contiguous().T  # in this layout its gradient is fast
        result = linear(small, B, base.bias)  # (T, out)
        return result.addmm_(flat, base.weight.T).unflatten(0, x.shape[:-1])


def prepare(model):
    """No dropout; LoraLinear, but not in 4 bits, on the head, nor for more than LoRA."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # an adapter's
            module.p = 0.0
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it has no gradient
        plain = type(module) is lora.Linear and type(module.base_layer) is torch.nn.Linear
        if plain and module is not head:
            if not module.lora_variant and not any(module.lora_bias.values()):
                module.__class__ = LoraLinear
    return model.eval()


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fingerprint(model) -> str:
    """Tells bases apart: a hash of how each weight begins, in bfloat16."""
    return digest([
        (tuple(weight.shape), weight.flatten()[:64].bfloat16().tolist())
        for name, weight in model.named_parameters()
        if ".lora_" not in name and weight.is_floating_point()])[:16]  # not 4 bits


# -------- log-probabilities

def precision(model):
    """Around a forward pass: a float32 adapter computes in its base's 16 bits."""
    return torch.autocast(model.device.type, torch.bfloat16, model.dtype == torch.bfloat16)


def token_logprobs(model, rollouts: list, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each completion token, and its row: (N,) fp32, (N,) int.

    The head sees completion positions only, a chunk at a time. They come from
    lengths: the pad token may be the end token.
    """
    pad = lambda rows: pad_sequence([torch.tensor(row) for row in rows], True).to(model.device)
    ids = pad(r.prompt_ids + r.completion_ids for r in rollouts)  # (B, L)  padding comes last
    target = pad([False] * len(r.prompt_ids) + [True] * len(r.completion_ids)
                 for r in rollouts)  # (B, L)
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone, head = causal.base_model, causal.get_output_embeddings()
    with precision(causal):
        hidden = backbone(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    hidden = hidden.to(causal.dtype)[target[:, 1:]]  # (N, D)  position t predicts t + 1
    tokens, rows = ids[target], target.nonzero()[:, 0]  # (N,), (N,)

    def chosen(hidden: Tensor, tokens: Tensor) -> Tensor:
        logits = head(hidden).float().div_(temperature)  # (chunk, V)
        return -cross_entropy(logits, tokens, reduction="none")  # (chunk,)

    size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    if len(tokens) <= size:
        return chosen(hidden, tokens), rows
    parts = []
    for h, t in zip(hidden.split(size), tokens.split(size)):
        start = h.detach().requires_grad_()  # (chunk, D)
        with torch.enable_grad():  # each slope at once, so that no logits are kept
            logprobs = chosen(start, t)  # (chunk,)
            slope, = torch.autograd.grad(logprobs.sum(), start)  # (chunk, D)
        parts.append(logprobs.detach() + ((h.float() - start.detach()) * slope).sum(-1))
    return torch.cat(parts), rows  # (N,), (N,)


def length(rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.completion_ids)


def sampled_logprobs(rollouts: list) -> Tensor:
    return torch.tensor([x for rollout in rollouts for x in rollout.logprobs])  # (N,)


def micro_batches(rollouts: list, budget: int) -> list[list]:
    """Rollouts, longest first, in batches of one or at most `budget` padded tokens."""
    batches: list[list] = []
    for rollout in sorted(rollouts, key=length, reverse=True):
        if batches and (len(batches[-1]) + 1) * length(batches[-1][0]) <= budget:
            batches[-1].append(rollout)
        else:
            batches.append([rollout])
    return batches


# -------- one update

class Learner:
    """All that an update of the adapter needs, but the answers."""

    def __init__(self, model, lr, temperature, micro_batch_tokens: int, cap: float = 0):
        self.model, self.named = model, trainable(model)
        self.optimizer = AdamW(
            self.named.values(), lr, (0.9, 0.95), weight_decay=0.0, fused=True)
        self.temperature, self.cap = temperature, cap
        self.micro_batch_tokens = micro_batch_tokens
        self.recomputes = model.is_gradient_checkpointing  # asking takes a millisecond
        self.adapter_arrived = False  # the sampler was seen to use it
        self.compared = torch.zeros(3)  # tokens, their gap to policy and base

    def update(self, rollouts: list, weights: Tensor) -> dict:
        """One step along (1/B) sum_i W_i grad log pi(y_i), weights (B,).

        Answers of weight 0 are left out. Out of memory halves the micro-batch,
        for good. Returns the norm before clipping and |learner - sampler| in
        nats per learned token. If it raises, no parameter was touched.
        """
        total = defaultdict(float)  # equal answers are learned once
        for rollout, weight in zip(rollouts, weights.tolist(), strict=True):
            total[rollout] += weight
        kept = {rollout: weight for rollout, weight in total.items() if weight}
        if not kept:
            return {"grad_norm": 0.0, "learned_tokens": 0,
                    "logprob_gap_mean": None, "logprob_gap_max": None}
        gap = None
        while gap is None:
            try:
                gap = self._gradient(kept, len(rollouts))  # (N,)
            except torch.OutOfMemoryError:
                if self.micro_batch_tokens <= min(map(length, kept)):
                    fail("too little memory to learn one answer at a time: lower "
                         "--max-new-tokens or --gpu-memory")
                self.micro_batch_tokens //= 2
                torch.cuda.empty_cache()
                tqdm.write(f"out of memory: --micro-batch-tokens is {self.micro_batch_tokens} now")
        norm = clip_grad_norm_(self.named.values(), MAX_GRAD_NORM).item()
        if not isfinite(norm):
            raise BadNumbers(f"the gradient norm is {norm}", self._guilty(kept, len(rollouts)))
        self._check_sampler(gap, list(kept))
        self.optimizer.step()
        return {"grad_norm": norm, "learned_tokens": len(gap),
                "logprob_gap_mean": gap.mean().item(), "logprob_gap_max": gap.max().item()}

    def _gradient(self, kept: dict, samples: int) -> Tensor:
        """Leave the gradient of these rollouts with their weights. -> gap (N,)."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.recomputes:
            self.model.train()  # only then does it
        gaps = []
        for batch in micro_batches(list(kept), self.micro_batch_tokens):
            logprobs, row = token_logprobs(self.model, batch, self.temperature)
            sampled = sampled_logprobs(batch).to(logprobs)  # (N,)
            gap = logprobs.detach() - sampled  # (N,)
            weight = torch.tensor([kept[each] for each in batch]).to(logprobs)[row]  # (N,)
            if self.cap:  # importance ratio: learner's / sampler's probability
                weight = weight * gap.exp().clamp(max=self.cap)  # (N,)
            rspo.policy_gradient_loss(logprobs, weight, samples).backward()
            gaps.append(gap.abs().cpu())
        return torch.cat(gaps)

    def _guilty(self, kept: dict, samples: int):
        """The rollout whose gradient alone is not finite, or None."""
        for rollout, weight in kept.items():
            self._gradient({rollout: weight}, samples)
            if not clip_grad_norm_(self.named.values(), MAX_GRAD_NORM).isfinite():
                return rollout

    @torch.no_grad()
    def _check_sampler(self, gap: Tensor, rollouts: list) -> None:
        """UserError unless the sampler drew from this policy.

        Rounding can hide a lost adapter. So a few answers are scored without it,
        too, until the sampler is twice as near to one of the two.
        """
        allowed = GAP_ALLOWED[self.model.dtype]
        noise = gap.std(correction=0) / len(gap) ** 0.5
        if not gap.mean() - 2 * noise <= allowed:  # NaN, too
            fail(f"sampler and learner disagree by {gap.mean():.2g} nats per token, "
                 f"rounding by {allowed:g}: another adapter, base or temperature, "
                 "top-k, top-p, or logits that change after the output layer")
        if self.adapter_arrived:
            return
        batches = micro_batches(rollouts, self.micro_batch_tokens)
        while batches and self.compared[0] < TOKENS_TO_DECIDE:
            few = batches.pop()  # the shortest, which are the end of `gap`
            with self.model.disable_adapter():
                base, _ = token_logprobs(self.model, few, self.temperature)  # (N,)
            to_base = (base.cpu() - sampled_logprobs(few)).abs()  # (N,)
            gap, to_policy = gap.split([len(gap) - len(base), len(base)])
            self.compared += torch.tensor([len(base), to_policy.sum(), to_base.sum()])
        tokens, to_policy, to_base = self.compared.tolist()
        if tokens < TOKENS_TO_DECIDE:  # go on in the next step
            return
        self.compared.zero_()
        self.adapter_arrived = to_base > 2 * to_policy
        if to_policy > 2 * to_base:
            fail("the sampler answers as the base model does: the adapter did not reach it")
