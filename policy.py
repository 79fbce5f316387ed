"""The LoRA policy: load a model, take log-probabilities, apply one update, write and read checkpoints.

The learner is exactly on-policy: log-probabilities are those of the distribution that was sampled
(logits / temperature, the whole vocabulary), the end token is trained, and every step divides once, by
the number of all its samples, so the gradient does not depend on how the step is cut into micro-batches.

A "rollout" here is anything with prompt_ids, completion_ids and logprobs (see `sample.Rollout`).
Shapes: B rows given to a function, L the longest one, D hidden size, V vocabulary, N completion tokens of all rows.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import transformers

for _library in ("bitsandbytes", "huggingface_hub"):             # warnings about what is optional, or said in a sentence here
    logging.getLogger(_library).setLevel(logging.ERROR)
from huggingface_hub.constants import HF_HOME
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import rspo
from tasks import UserError, nearest

transformers.utils.logging.disable_progress_bar()

TOY = Path(__file__).resolve().parent / "toy"
# Short names: the hub organisation of a model family.
ORGANISATIONS = {"Qwen": "Qwen", "SmolLM": "HuggingFaceTB", "Llama": "meta-llama", "gemma": "google",
                 "OLMo": "allenai", "DeepSeek": "deepseek-ai", "Mistral": "mistralai", "phi": "microsoft"}
LOGITS_AT_ONCE = 2**27          # elements; the vocabulary head runs on so many logits at a time (0.5 GB in fp32)
LOGIT_BYTES = 20                # at the peak of its backward pass: five fp32 copies of a logit
FORMAT = 1                      # of checkpoints, in their state.json; another version writes another number
CHECKPOINT_FILES = {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json"}


class BadNumbers(ArithmeticError):
    """A reward, log-probability, loss or gradient is NaN or infinite. The update was not applied."""

    def __init__(self, message: str, index: int | None = None):
        """index: of the sample to blame among the step's P * n, where it is known."""
        super().__init__(message)
        self.index = index


class BrokenPolicy(BadNumbers):
    """The policy's own probabilities are NaN or infinite: nothing can be sampled from it."""


# ---------------------------------------------------------------- load

def resolve_model(name: str) -> tuple[str, Path | None]:
    """Base model (folder or hub id) and adapter folder, if any, of what a user calls a model.

    name: `toy`, a hub id, a short name, a local model folder, a run directory (its newest checkpoint) or a
    checkpoint / PEFT adapter folder. Raises UserError for a name that can be none of these.
    """
    if name == "toy":
        return str(TOY), None
    folder = Path(name)
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            if (folder / "SHA256SUMS").is_file() and (damage := flaw(folder)):
                raise UserError(f"checkpoint {folder} is not whole: {damage}; the newest whole one there is {newest_checkpoint(folder.parent)}")
            return read_adapter(folder)["base_model_name_or_path"], folder
        run = read_run(folder)
        if run is None:
            return name, None
        newest = newest_checkpoint(folder)
        if newest is None:
            raise UserError(f"run directory {name} holds no whole checkpoint (step_...)")
        return resolve_model(run["flags"]["model"])[0], newest
    if "/" in name:
        return name, None
    for family, organisation in ORGANISATIONS.items():
        if name.lower().startswith(family.lower()):
            return f"{organisation}/{name}", None
    raise UserError(f"model {name!r} is unknown{nearest(name, ['toy', *ORGANISATIONS])}; give 'toy', a hub id "
                    f"(owner/name), a local folder, or a short name that begins with one of {', '.join(ORGANISATIONS)}")


def read_adapter(folder: Path) -> dict:
    """adapter_config.json of a LoRA adapter. UserError if it is anything else; weights in a pickle are refused."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        if not isinstance(config["base_model_name_or_path"], str) or min(config["r"], config["lora_alpha"]) < 1:
            raise ValueError("a value that cannot be")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}/adapter_config.json is not that of a LoRA adapter ({type(error).__name__}: {error})") from error
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"adapter {folder} has no adapter_model.safetensors, the only form of weights that is read")
    return config


def read_run(folder: Path) -> dict | None:
    """config.json of a run directory, or None where the folder is not one."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    return config if isinstance(config, dict) and isinstance(config.get("flags"), dict) else None


def run_flags(folder: Path, names) -> dict:
    """The flags of those names of a run directory. Raises UserError if config.json lacks one."""
    flags = read_run(folder)["flags"]
    for name in sorted(names):
        if name not in flags:
            raise UserError(f"{folder}/config.json lacks the flag {name!r}: it was written by another version of train.py")
    return {name: flags[name] for name in names}


def pick_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(dtype: str) -> str:
    return dtype if dtype != "auto" else "bfloat16" if pick_device() == "cuda" else "float32"


@contextmanager
def _loading(base: str):
    """Turn what transformers raises for a model that cannot be had into one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        what = "folder" if Path(base).is_dir() else "hub model"
        raise UserError(f"the {what} {base} could not be loaded ({reason}); without internet, give --model a local folder with "
                        "config.json, the tokenizer's files and *.safetensors") from error


def load_tokenizer(base: str):
    with _loading(base):
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)      # else transformers would ask at the terminal
        if not tokenizer("1 + 1", add_special_tokens=False).input_ids:      # made up by transformers where files are missing
            raise ValueError("it has no tokenizer files")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, dtype: str = "auto", device: str | None = None, trainable_adapter: bool = False,
               load_in_4bit: bool = False):
    """(model, tokenizer) of `resolve_model(name)`, in evaluation mode, adapter attached where there is one.

    dtype: "auto" is bfloat16 on CUDA and float32 elsewhere. load_in_4bit keeps the base's linear layers in NF4 with
    doubly quantised scales (QLoRA, arXiv 2305.14314) and computes in dtype. Only safetensors are read, never a pickle,
    and no code of the checkpoint is run. Raises UserError where the model cannot be loaded.
    """
    base, adapter = resolve_model(name)
    tokenizer = load_tokenizer(base)
    device, dtype = device or pick_device(), getattr(torch, pick_dtype(dtype))
    quantised = {"device_map": {"": device}, "quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)}
    with _loading(base):
        model, info = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, use_safetensors=True, output_loading_info=True,
                                                           trust_remote_code=False, **(quantised if load_in_4bit else {}))
        if info["missing_keys"]:        # transformers would fill them with random numbers
            raise ValueError(f"its weights lack {sorted(info['missing_keys'])[0]} and {len(info['missing_keys']) - 1} more")
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):           # bitsandbytes would swap in a layout without gradient, rounded again
            module.support_avx512bf16_for_cpu = False
        if isinstance(getattr(module, "dropout", None), float):     # of a whole layer (OPT); what is sampled is what is learned
            module.dropout = 0.0
    if adapter is not None:
        with _loading(str(adapter)):
            model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable_adapter)
    model = (model if load_in_4bit else model.to(device)).eval()
    check_head(model)
    return model, tokenizer


@torch.no_grad()
def dequantised_copy(model, tokenizer) -> Path:
    """Folder with an ordinary copy of a 4-bit model's base, every weight as the learner computes with it.

    It is what vLLM serves, so that sampler and learner share one base function; the original weights are another
    (LOG.md has the gap). Written once, named after its content, kept in the Hugging Face cache.
    """
    from bitsandbytes.functional import dequantize_4bit
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    config = type(causal.config).from_dict({k: v for k, v in causal.config.to_dict().items() if k != "quantization_config"})
    weights, digest = {}, hashlib.sha256(config.to_json_string().encode())
    for name, weight in causal.named_parameters():
        if ".lora_" not in name:
            quantised = getattr(weight, "quant_state", None)
            value = weight if quantised is None else dequantize_4bit(weight, quantised)
            value = value.detach().to(causal.dtype).cpu().contiguous()
            weights[name.replace(".base_layer", "")] = value
            digest.update(value.view(-1).view(torch.uint8).numpy())
    name = Path(causal.config._name_or_path or "model").name
    folder = Path(HF_HOME) / "rspo" / f"{name}-nf4-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent)
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(config, dtype=causal.dtype)
        plain.load_state_dict(weights, strict=False, assign=True)
        plain.tie_weights()
        plain.generation_config = causal.generation_config
        plain.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        os.replace(unfinished, folder)
        size = sum(weight.nbytes for weight in weights.values()) / 2**30
        print(f"wrote the dequantised base for vLLM, {size:.2f} GiB, to {folder} (kept for the next run; delete it at will)")
    return folder


@torch.no_grad()
def check_head(model) -> None:
    """Refuse models whose logits are more than a linear head on the last hidden state (soft-capping, scaling)."""
    ids = torch.arange(4, device=model.device)[None]                              # (1, 4)
    expected = model(input_ids=ids, use_cache=False).logits                       # (1, 4, V)
    base, head = _backbone_and_head(model)
    found = head(base(input_ids=ids, use_cache=False).last_hidden_state)          # (1, 4, V)
    gap = (expected - found).abs().max().item()
    if not gap <= 1e-2 * expected.abs().max().item() + 1e-3:
        raise UserError(f"{model.config.model_type} models change their logits after the output layer (by up to {gap:.3g} "
                        "here), which this learner does not reproduce; use another model")


def add_lora(model, rank: int, alpha: int, seed: int) -> PeftModel:
    """The model with a fresh fp32 LoRA adapter on every linear layer but the head; dropout 0, its second factor 0.

    At the start the adapter changes nothing: `model.disable_adapter()` is the reference model at any time.
    """
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    try:
        return get_peft_model(model, config).eval()
    except ValueError as error:         # Mamba, for one
        raise UserError(f"PEFT puts no adapter on the linear layers of {model.config.model_type} models ({str(error).splitlines()[0][:200]}); "
                        "use another model") from error


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------- log-probabilities

def _backbone_and_head(model):
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    return causal.base_model, causal.get_output_embeddings()


def token_logprobs(model, rollouts: list, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of every completion token of B rollouts, and the row it belongs to: (N,) fp32, (N,) int.

    The backbone runs once; the vocabulary head sees completion positions only, a chunk at a time, so that the
    full (B, L, V) logits never exist. Masks come from lengths: the pad token may be the end token.
    """
    device = model.device
    lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in rollouts]
    ids = torch.zeros(len(rollouts), max(lengths), dtype=torch.long)                    # (B, L)
    attend, target = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)     # (B, L)
    for row, (rollout, length) in enumerate(zip(rollouts, lengths)):
        ids[row, :length] = torch.tensor([*rollout.prompt_ids, *rollout.completion_ids])
        attend[row, :length] = 1
        target[row, len(rollout.prompt_ids):length] = True
    rows = target.nonzero()[:, 0].to(device)                                            # (N,)
    ids, attend, target = ids.to(device), attend.to(device), target.to(device)
    backbone, head = _backbone_and_head(model)
    hidden = backbone(input_ids=ids, attention_mask=attend, use_cache=False).last_hidden_state   # (B, L, D)
    hidden = hidden[:, :-1][target[:, 1:]]                                              # (N, D)  position t predicts t + 1
    tokens = ids[target]                                                                # (N,)

    def chosen(hidden: Tensor, tokens: Tensor) -> Tensor:
        logits = head(hidden).float() / temperature                                     # (chunk, V)
        return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)          # (chunk,)

    size = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    if len(tokens) <= size:
        return chosen(hidden, tokens), rows
    parts = [checkpoint(chosen, h, t, use_reentrant=False) for h, t in zip(hidden.split(size), tokens.split(size))]
    return torch.cat(parts), rows                                                       # (N,), (N,)


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of rows, longest first, in batches of at most `budget` tokens, padding included.

    A row longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


# ---------------------------------------------------------------- memory

@contextmanager
def recomputing(model):
    """Inside, layers under `gradient_checkpointing_enable` keep their input alone and are run again in the backward pass.

    transformers does so in training mode only. Only the layers' own flag is set: nothing inside them starts to drop out.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def learning_bytes(model, tokens: int) -> dict[str, int]:
    """Estimated bytes of learning a micro-batch of that many tokens, by part.

    Activations are counted, not modelled: the tensors that autograd keeps for short rows (in bytes a token, parameters
    left out) are extrapolated to `tokens`. "workspace" is the larger of what is needed for a moment only: a chunk of
    logits, or one layer that is run again. Attention kernels that build the (L, L) matrix are not covered.
    """
    def kept(length: int) -> int:
        storages = {}
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes(), storage           # held, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            _backbone_and_head(model)[0](input_ids=torch.zeros(1, length, dtype=torch.long, device=model.device), use_cache=False)
        return sum(size for size, _ in storages.values())

    def per_token() -> float:
        return max(0.0, (kept(192) - kept(64)) / 128)

    full = per_token()
    with recomputing(model):
        activations = per_token()
    one_layer = full / model.config.num_hidden_layers if activations < full else 0.0
    logits = min(LOGITS_AT_ONCE, tokens * _backbone_and_head(model)[1].weight.shape[0]) * LOGIT_BYTES
    adapter = sum(p.nbytes for p in trainable(model).values())
    return {"weights": sum(p.nbytes for p in model.parameters()) + 3 * adapter,         # + gradient and two moments
            "activations": int(activations * tokens), "workspace": max(logits, int(one_layer * tokens))}


def rehearse(model, prompt: int, answer: int, rows: int, micro_batch_tokens: int) -> None:
    """Learn the worst micro-batch once, for nothing: the longest prompt and answers (tokens), as many as one batch holds.

    Raises UserError where the GPU's memory does not suffice. Changes no parameter and leaves no gradient.
    """
    length = prompt + answer
    rows = len(micro_batches([length] * rows, micro_batch_tokens)[0])
    fakes = [_Fake((0,) * prompt, (0,) * answer)] * rows
    parts = learning_bytes(model, rows * length)
    try:
        moments = [torch.empty_like(p) for p in trainable(model).values() for _ in range(2)]         # those of the optimizer
        with recomputing(model):
            logprobs, _ = token_logprobs(model, fakes, 1.0)
            logprobs.sum().backward()
    except torch.OutOfMemoryError as error:
        estimate = " + ".join(f"{size / 2**30:.1f} {part}" for part, size in parts.items())
        free = torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else float("nan")
        raise UserError(f"the GPU's memory does not suffice to learn {rows} answers of {length} tokens at once (estimated "
                        f"{sum(parts.values()) / 2**30:.1f} GiB = {estimate}; free now {free:.1f}): lower --micro-batch-tokens "
                        f"({micro_batch_tokens}), --max-new-tokens ({answer}) or, with vLLM, --gpu-memory, or add "
                        "--gradient-checkpointing or --load-in-4bit") from error
    finally:
        moments = None
        for parameter in model.parameters():
            parameter.grad = None


@dataclass(frozen=True)
class _Fake:
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


# ---------------------------------------------------------------- one update

def make_optimizer(model, lr: float, eight_bit: bool) -> torch.optim.Optimizer:
    """AdamW on the adapter; eight_bit keeps its moments in blocks of 8-bit numbers (bitsandbytes, arXiv 2110.02861)."""
    settings = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.0}
    if not eight_bit:
        return torch.optim.AdamW(trainable(model).values(), **settings)
    from bitsandbytes.optim import AdamW8bit
    return AdamW8bit(trainable(model).values(), **settings)


@torch.no_grad()
def agreement(model, rollouts: list, temperature: float) -> tuple[float, float]:
    """|learner - sampler| of the log-probabilities of rollouts [B], nats a token: mean and maximum."""
    logprobs, _ = token_logprobs(model, rollouts, temperature)                          # (N,)
    gap = (logprobs.cpu() - _sampled(rollouts)).abs()                                   # (N,)
    return gap.mean().item(), gap.max().item()


def _sampled(rollouts: list) -> Tensor:
    return torch.tensor([value for rollout in rollouts for value in rollout.logprobs])  # (N,)


def update(model, optimizer, rollouts: list, weights: Tensor, *, num_samples: int, temperature: float,
           micro_batch_tokens: int, max_grad_norm: float, importance_cap: float = 0.0) -> dict:
    """One policy-gradient step on rollouts [B] with weights (B,). Rows of weight 0 have no gradient and are left out.

    num_samples: P * n of the whole step, the one normaliser. importance_cap > 0 multiplies each token's weight by
    min(learner's / sampler's probability, cap), for a sampler whose arithmetic differs a little (vLLM); 0 leaves
    the ratio out. Returns grad_norm (before clipping at max_grad_norm; 0 if every weight is 0: then nothing is changed),
    learned_tokens, and the gap |sampler - learner| of the log-probabilities in nats, mean and maximum over the learned
    tokens (None without any).
    Raises BadNumbers, with the parameters untouched, if a log-probability, the loss or the gradient is not finite.
    """
    kept = [i for i, weight in enumerate(weights.tolist()) if weight != 0]
    if not kept:
        return {"grad_norm": 0.0, "learned_tokens": 0, "logprob_gap_mean": None, "logprob_gap_max": None}
    optimizer.zero_grad(set_to_none=True)
    lengths = [len(rollouts[i].prompt_ids) + len(rollouts[i].completion_ids) for i in kept]
    gap_sum, gap_max, learned = 0.0, 0.0, 0
    for batch in micro_batches(lengths, micro_batch_tokens):
        gap = _add_gradient(model, rollouts, weights, [kept[i] for i in batch], num_samples, temperature, importance_cap)
        gap_sum, gap_max, learned = gap_sum + gap.sum().item(), max(gap_max, gap.max().item()), learned + len(gap)
    parameters = list(trainable(model).values())
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if not grad_norm < float("inf"):
        for i in kept:                                                                  # which one is it? Each alone, once more
            optimizer.zero_grad(set_to_none=True)
            _add_gradient(model, rollouts, weights, [i], num_samples, temperature, importance_cap)
            if not all(torch.isfinite(p.grad).all() for p in parameters if p.grad is not None):
                raise BadNumbers(f"the gradient norm is {grad_norm}", i)
        raise BadNumbers(f"the gradient norm is {grad_norm}")
    optimizer.step()
    return {"grad_norm": grad_norm, "learned_tokens": learned, "logprob_gap_mean": gap_sum / learned, "logprob_gap_max": gap_max}


def _add_gradient(model, rollouts: list, weights: Tensor, indices: list[int], num_samples: int, temperature: float,
                  importance_cap: float) -> Tensor:
    """Add the gradient of those rollouts, one micro-batch, to the parameters'. Returns |sampler - learner| of their tokens, (N,)."""
    chosen = [rollouts[i] for i in indices]
    with recomputing(model):
        logprobs, rows = token_logprobs(model, chosen, temperature)                     # (N,), (N,)
        token_weights = weights[indices].to(logprobs.device, logprobs.dtype)[rows]      # (N,)
        sampled = _sampled(chosen).to(logprobs.device)                                  # (N,)
        gap = logprobs.detach() - sampled                                               # (N,)
        if importance_cap:
            token_weights = token_weights * gap.exp().clamp(max=importance_cap)         # (N,)
        for name, values in (("log-probability", logprobs), ("sampler's log-probability", sampled), ("weight", token_weights)):
            if not torch.isfinite(values).all():
                first = (~torch.isfinite(values)).nonzero()[0, 0]
                raise BadNumbers(f"the {name} of a token is {values[first].item()}", indices[rows[first]])
        loss = rspo.policy_gradient_loss(logprobs, token_weights, num_samples)          # ()
        if not torch.isfinite(loss):
            raise BadNumbers(f"the loss is {loss.item()}")
        loss.backward()
    return gap.abs()


# ---------------------------------------------------------------- checkpoints

def save_checkpoint(run: Path, step: int, model: PeftModel, optimizer, state: dict, keep: int = 0) -> Path:
    """Write run/step_000100/: the adapter in PEFT's layout, optimizer.safetensors, state.json, SHA256SUMS. Atomic, no pickle.

    A whole checkpoint of this step that is already there is of the same policy: it stays. Then keep > 0 removes the
    oldest ones before it, so that `keep` are left.
    """
    final = Path(run) / f"step_{step:06d}"
    if flaw(final):
        unfinished = Path(run) / f".{final.name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            model.save_pretrained(unfinished)
            moments = {f"{name}:{key}": torch.as_tensor(value).clone()      # clone: 8-bit moments share their code book
                       for name, parameter in trainable(model).items() for key, value in optimizer.state[parameter].items()}
            save_file(moments, unfinished / "optimizer.safetensors")
            (unfinished / "state.json").write_text(json.dumps({"format": FORMAT, "base": fingerprint(model), "step": step, **state}))
            sums = [f"{_digest(path)}  {path.name}\n" for path in sorted(unfinished.iterdir())]
            (unfinished / "SHA256SUMS").write_text("".join(sums))
            for path in [*unfinished.iterdir(), *Path(run).glob("*.jsonl"), unfinished]:     # on disk before the rename makes it count
                _flush(path)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)                   # gives its room back
            raise OSError(f"{final.name} could not be written ({error})") from error
        shutil.rmtree(final, ignore_errors=True)                            # damaged, if there
        os.replace(unfinished, final)
        _flush(run)
    older = [folder for folder in checkpoints(run) if int(folder.name[5:]) < step]
    for folder in older[:max(0, len(older) - keep + 1)] if keep else []:
        os.replace(folder, rubbish := folder.with_name(f".{folder.name}.unfinished"))       # never half of one under its name
        shutil.rmtree(rubbish, ignore_errors=True)
    return final


def load_checkpoint(folder: Path, model: PeftModel, optimizer) -> dict:
    """Put adapter and optimizer back as `save_checkpoint` left them; returns its state, `step` included. UserError if it is not this model's."""
    state = json.loads((folder / "state.json").read_text())
    for name, ours, of in (("format", FORMAT, "version of train.py"), ("base", fingerprint(model), "model")):
        if state.pop(name, None) != ours:
            raise UserError(f"checkpoint {folder} was written with another {of}; move it away, and --resume takes the newest one before it")
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    moments: dict[str, dict] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        name, kind = key.rsplit(":", 1)
        integer = value.ndim == 0 and value.dtype == torch.int64            # 8-bit AdamW counts its steps in a plain int
        moments.setdefault(name, {})[kind] = value.item() if integer else value
    saved = optimizer.state_dict()
    saved["state"] = {index: moments[name] for index, name in enumerate(trainable(model)) if name in moments}
    optimizer.load_state_dict(saved)
    return state


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, whole or not, oldest first."""
    found = [path for path in Path(run).glob("step_*") if re.fullmatch(r"step_[0-9]{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run. Newer ones that are not whole are named, once."""
    for folder in reversed(checkpoints(run)):
        damage = flaw(folder)
        if damage is None:
            return folder
        _say(f"checkpoint {folder} is left aside: {damage}")
    return None


def flaw(folder: Path) -> str | None:
    """What keeps a checkpoint from being whole; None if it is. What `sha256sum -c SHA256SUMS` would say."""
    try:
        listed = (folder / "SHA256SUMS").read_text()
        sums = {name: digest for digest, name in re.findall(r"([0-9a-f]{64})  (.+)\n", listed)}
        if not CHECKPOINT_FILES <= sums.keys() or listed != "".join(f"{digest}  {name}\n" for name, digest in sums.items()):
            return "SHA256SUMS is damaged"
        for name, digest in sums.items():
            if _digest(folder / name) != digest:
                return f"{name} is damaged, its checksum is not that of SHA256SUMS"
    except (FileNotFoundError, NotADirectoryError) as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    return None


def fingerprint(model) -> str:
    """Tells one base model from another: a hash of how each of its weights begins, in bfloat16 whatever they are kept in."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if ".lora_" not in name and weight.is_floating_point():             # 4-bit weights are not: their bytes differ by device
            start = weight.detach().flatten()[:64].to("cpu", torch.bfloat16)
            digest.update(repr(tuple(weight.shape)).encode() + start.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(path: Path) -> str:
    status = path.stat()
    return _digest_of(path, status.st_size, status.st_mtime_ns)


@cache
def _digest_of(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _say(sentence: str) -> None:
    print(sentence)


def _flush(path: Path) -> None:
    """Have a file or folder on disk, and not only on its way there."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
