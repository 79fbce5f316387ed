"""The LoRA policy: load a base and an adapter, take log-probabilities, apply one update.

The learner is exactly on-policy: its log-probabilities are those of the distribution that was
sampled (logits / temperature, the whole vocabulary), and the end token is learned. A step divides
once, by the number of its samples, so that how it is cut does not change its gradient.

Shapes: B rollouts, L tokens of the longest, N completion tokens of all, D hidden, V vocabulary.
"""

import hashlib
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import rspo
from lib.cli import UserError

transformers.utils.logging.disable_progress_bar()

LORA_ALPHA = 32  # the adapter's scale is alpha / rank
MAX_GRAD_NORM = 1.0
LOGITS_AT_ONCE = 2**27  # elements: the vocabulary head runs on so many logits (0.5 GB)
GAP_ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # nats per token, sampler to learner


class BadNumbers(ArithmeticError):
    """A reward or the gradient is NaN or infinite. The update was not applied."""

    def __init__(self, message: str, rollout=None):
        super().__init__(message)
        self.rollout = rollout  # the one to blame, where it is known


class BrokenPolicy(BadNumbers):
    """The policy's own probabilities are NaN or infinite: nothing can be sampled from it."""


# ---------------------------------------------------------------- load

def pick_device() -> str:
    mps = torch.backends.mps.is_available()
    return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"


def pick_dtype(dtype: str) -> str:
    return dtype if dtype != "auto" else "bfloat16" if pick_device() == "cuda" else "float32"


@contextmanager
def loading(base: str):
    """Turn what the libraries raise for a model that cannot be had into one sentence."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError,
            RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        what = "folder" if Path(base).is_dir() else "hub model"
        raise UserError(f"the {what} {base} could not be loaded ({reason}); without internet, "
                        "give a folder with config.json, tokenizer and *.safetensors") from error


def load_model(base: str, adapter: Path | None = None, dtype: str = "auto",
               device: str | None = None, trainable_adapter: bool = False,
               load_in_4bit: bool = False):
    """(model, tokenizer) of a folder or hub id, in evaluation mode, with the adapter if given.

    load_in_4bit: linear layers in NF4 (QLoRA, arXiv 2305.14314). Nothing drops out: what is
    sampled is what is learned. Only safetensors are read, and no code of the checkpoint is run.
    """
    device, dtype = device or pick_device(), getattr(torch, pick_dtype(dtype))
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                             bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    quantised = {"device_map": {"": device}, "quantization_config": nf4} if load_in_4bit else {}
    with loading(base):
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        if not tokenizer("1 + 1", add_special_tokens=False).input_ids:
            raise ValueError("it has no tokenizer files")  # transformers made one up
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        model, info = AutoModelForCausalLM.from_pretrained(
            base, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, **quantised)
        if info["missing_keys"]:  # transformers would fill them with random numbers
            raise ValueError(f"its weights lack {sorted(info['missing_keys'])[0]}")
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # a layout without gradient
    if adapter is not None:
        with loading(str(adapter)):
            model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable_adapter)
    return (model if load_in_4bit else model.to(device)).eval(), tokenizer


def write_dequantised(base: str, dtype: str, folder: str) -> None:
    """Write a base as a 4-bit learner computes with it: what vLLM must serve beside one."""
    model, tokenizer = load_model(base, dtype=dtype, load_in_4bit=True)
    model.dequantize().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def add_lora(model, rank: int, seed: int) -> PeftModel:
    """The model with a fresh float32 LoRA adapter on every linear layer but the head.

    Its second factor is 0: it changes nothing at first.
    """
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=LORA_ALPHA, lora_dropout=0.0,
                        target_modules="all-linear", task_type="CAUSAL_LM")
    try:
        return get_peft_model(model, config).eval()
    except ValueError as error:  # Mamba, for one
        raise UserError(f"PEFT puts no adapter on the linear layers of {model.config.model_type}"
                        f" models ({str(error).splitlines()[0][:200]})") from error


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fingerprint(model) -> str:
    """Tells one base from another: a hash of how each of its weights begins, in bfloat16."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if ".lora_" not in name and weight.is_floating_point():  # 4-bit ones differ by device
            start = weight.detach().flatten()[:64].to("cpu", torch.bfloat16)
            digest.update(repr(tuple(weight.shape)).encode())
            digest.update(start.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- log-probabilities

def token_logprobs(model, rollouts: list, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each completion token of B rollouts, and its row: (N,) fp32, (N,) int.

    The backbone runs once, padded on the right, which no earlier token sees. The head sees
    completion positions only, a chunk at a time: logits (B, L, V) never exist. Targets come from
    lengths: the pad token may be the end token.
    """
    ids = torch.zeros(len(rollouts), max(map(length, rollouts)), dtype=torch.long)  # (B, L)
    target = torch.zeros_like(ids, dtype=torch.bool)  # (B, L)
    for row, rollout in enumerate(rollouts):
        ids[row, :length(rollout)] = torch.tensor(rollout.prompt_ids + rollout.completion_ids)
        target[row, len(rollout.prompt_ids):length(rollout)] = True
    ids, target = ids.to(model.device), target.to(model.device)
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    backbone, head = causal.base_model, causal.get_output_embeddings()
    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state  # (B, L, D)
    hidden = hidden[:, :-1][target[:, 1:]]  # (N, D)  position t predicts t + 1
    tokens, rows = ids[target], target.nonzero()[:, 0]  # (N,), (N,)

    def chosen(hidden: Tensor, tokens: Tensor) -> Tensor:
        logits = head(hidden).float() / temperature  # (chunk, V)
        return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)  # (chunk,)

    size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    if len(tokens) <= size:
        return chosen(hidden, tokens), rows
    parts = [checkpoint(chosen, h, t, use_reentrant=False)
             for h, t in zip(hidden.split(size), tokens.split(size))]
    return torch.cat(parts), rows  # (N,), (N,)


def length(rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.completion_ids)


def sampled_logprobs(rollouts: list) -> Tensor:
    return torch.tensor([x for rollout in rollouts for x in rollout.logprobs])  # (N,)


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Rows, longest first, in batches of at most `budget` tokens (or one row), padding included."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


# ---------------------------------------------------------------- one update

class Learner:
    """AdamW on the adapter of `model`: all that an update needs but the answers.

    cap > 0: a token's weight is multiplied by min(learner's / sampler's probability, cap).
    """

    def __init__(self, model, lr: float, temperature: float, micro_batch_tokens: int,
                 cap: float = 0.0):
        self.model, self.named = model, trainable(model)
        self.parameters = list(self.named.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr, (0.9, 0.95), weight_decay=0.0)
        self.temperature, self.cap = temperature, cap
        self.micro_batch_tokens = micro_batch_tokens
        self.adapter_arrived = False  # whether the sampler was seen to use the adapter

    def update(self, rollouts: list, weights: Tensor) -> dict:
        """One step along (1/B) sum_i W_i grad log pi(y_i): B rollouts, weights (B,).

        Answers of weight 0 have no gradient and are left out. Out of memory halves the
        micro-batch, for good, with the same gradient. Returns the gradient's norm before
        clipping and |learner - sampler| in nats per learned token. BadNumbers, or UserError
        where the sampler drew from another policy: no parameter was touched.
        """
        kept = [i for i, weight in enumerate(weights.tolist()) if weight != 0]
        if not kept:
            return {"grad_norm": 0.0, "learned_tokens": 0,
                    "logprob_gap_mean": None, "logprob_gap_max": None}
        gap = None
        while gap is None:
            try:
                gap = self._gradient(rollouts, weights, kept)  # (N,)
            except torch.OutOfMemoryError as error:
                if self.micro_batch_tokens <= min(length(rollouts[i]) for i in kept):
                    raise UserError("too little memory to learn one answer at a time: lower "
                                    "--max-new-tokens or --gpu-memory") from error
                self.micro_batch_tokens //= 2
                torch.cuda.empty_cache()
                tqdm.write("out of memory: from now on --micro-batch-tokens is "
                           f"{self.micro_batch_tokens}, with the same gradient")
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM).item()
        if not norm < float("inf"):
            raise BadNumbers(f"the gradient norm is {norm}", self._guilty(rollouts, weights, kept))
        self._check_sampler(gap, [rollouts[i] for i in kept])
        self.optimizer.step()
        return {"grad_norm": norm, "learned_tokens": len(gap),
                "logprob_gap_mean": gap.mean().item(), "logprob_gap_max": gap.max().item()}

    def _gradient(self, rollouts: list, weights: Tensor, kept: list[int]) -> Tensor:
        """Leave the gradient of those `kept` in the parameters. -> gap to the sampler (N,)."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()  # recomputes activations where asked; nothing drops out
        lengths, gaps = [length(rollouts[i]) for i in kept], []
        for batch in micro_batches(lengths, self.micro_batch_tokens):
            batch = [kept[i] for i in batch]
            chosen = [rollouts[i] for i in batch]
            logprobs, row = token_logprobs(self.model, chosen, self.temperature)  # (N,), (N,)
            gap = logprobs.detach() - sampled_logprobs(chosen).to(logprobs)  # (N,)
            weight = weights[batch].to(logprobs)[row]  # (N,)
            if self.cap:
                weight = weight * gap.exp().clamp(max=self.cap)  # (N,)
            rspo.policy_gradient_loss(logprobs, weight, len(weights)).backward()
            gaps.append(gap.abs().cpu())
        return torch.cat(gaps)

    def _guilty(self, rollouts: list, weights: Tensor, kept: list[int]):
        """The rollout whose gradient alone is not finite, or None."""
        for i in kept:
            self._gradient(rollouts, weights, [i])
            if not all(p.grad.isfinite().all() for p in self.parameters if p.grad is not None):
                return rollouts[i]

    @torch.no_grad()
    def _check_sampler(self, gap: Tensor, rollouts: list) -> None:
        """UserError unless the sampler drew from this policy, as far as rounding shows it.

        In bfloat16 it hides an adapter that never arrived. So a few answers are scored without
        the adapter, too, until the sampler is twice as near to one of the two.
        """
        allowed, noise = GAP_ALLOWED[self.model.dtype], gap.std(correction=0) / len(gap) ** 0.5
        if not gap.mean() - 2 * noise <= allowed:  # NaN, too
            raise UserError(
                f"sampler and learner disagree by {gap.mean():.2g} nats per token, more than "
                f"rounding explains ({allowed:g}): another adapter, base or temperature, top-k or "
                "top-p, stale cache blocks, or logits that change after the output layer")
        if self.adapter_arrived:
            return
        few = micro_batches(list(map(length, rollouts)), self.micro_batch_tokens)[-1]
        few = [rollouts[i] for i in few]  # the shortest
        policy, _ = token_logprobs(self.model, few, self.temperature)  # (N,)
        with self.model.disable_adapter():
            base, _ = token_logprobs(self.model, few, self.temperature)  # (N,)
        sampled = sampled_logprobs(few).to(base)  # (N,)
        to_policy, to_base = (sampled - policy).abs().sum(), (sampled - base).abs().sum()
        if len(sampled) >= 64 and to_policy > 2 * to_base:
            raise UserError("the sampler answers as the base model does: the adapter did not "
                            "reach it")
        self.adapter_arrived = bool(len(sampled) >= 64 and to_base > 2 * to_policy)
