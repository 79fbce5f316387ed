"""Rollouts and the samplers that make them; as a script, n answers to each problem in a JSONL file.

    python sample.py                                               the toy model on held-out Countdown problems
    python sample.py --model runs/x --n 64 --out samples.jsonl     a trained run; then: python evaluate.py --model samples.jsonl

A sampler draws from softmax(logits / temperature) over the whole vocabulary, nothing cut off (no top-k, no
top-p): training is only right for the distribution that was sampled. Both samplers, transformers' and vLLM's, say with which
log-probability they drew each token, so that the learner can be held against it.
"""

import argparse
import atexit
import fcntl
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig, LogitsProcessor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

import policy
import tasks
from tasks import Problem, UserError

CACHE_TOKENS = 2**18          # prompt and answer tokens that transformers' generate holds in its cache at a time
STAGE_TOKENS = 64           # after so many, transformers' generate lets finished answers go: they would be computed on to the longest one's end
CPU_CACHE_BYTES = 2**30     # vLLM's cache on a machine without a GPU
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)     # what vLLM can be built for; a smaller adapter fits into a larger one


@dataclass(frozen=True)
class Rollout:
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]     # ends with an end token iff the model stopped by itself
    logprobs: tuple[float, ...]         # of completion_ids, the sampler's own, in nats, at the sampling temperature
    text: str                           # the completion without its end token
    finished: bool                      # False: cut off at max_new_tokens


# ---------------------------------------------------------------- prompts

def stop_ids(settings: GenerationConfig, tokenizer) -> list[int]:
    """All tokens that end an answer: the tokenizer's, the generation settings' and the one that ends a turn of the chat template.

    Qwen2.5-Math's base model needs the last one: it names <|endoftext|> alone, and a chat prompt is answered with <|im_end|>.
    """
    configured = settings.eos_token_id
    stops = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    if tokenizer.chat_template:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "?"}, {"role": "assistant", "content": "the answer"}], tokenize=False)
        _, answered, behind = chat.rpartition("the answer")
        first = tokenizer(behind, add_special_tokens=False).input_ids[:1] if answered else []
        stops |= {i for i in first if i in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[i].special}
    if stops <= {None}:
        raise UserError("neither the model's tokenizer nor its generation settings name an end token, so every answer would be cut off; add an "
                        "eos_token to its tokenizer_config.json, or use another model")
    return sorted(i for i in stops if i is not None)


def encode_prompts(problems: list[Problem], tokenizer, context: int, max_new_tokens: int) -> list[tuple[int, ...]]:
    """Token ids of each problem's prompt. Raises UserError if one and its answer do not fit the context (tokens)."""
    prompts = []
    for problem in problems:
        text = tasks.render(problem, tokenizer)
        # A chat template writes its own special tokens; a plain prompt gets the tokenizer's (a BOS, for some).
        ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids
        if not ids:
            raise UserError(f"problem {problem.id}: its prompt {text[:40]!r} has no tokens")
        if len(ids) + max_new_tokens > context:
            raise UserError(f"problem {problem.id}: prompt of {len(ids)} tokens + --max-new-tokens {max_new_tokens} exceed "
                            f"the model's context of {context} tokens")
        prompts.append(tuple(ids))
    return prompts


# ---------------------------------------------------------------- transformers

class HFSampler:
    """Samples with transformers' generate, from the very model object that learns: it is never out of date."""

    adapter_root = None         # needs no adapter files
    block_tokens = CACHE_TOKENS   # prompt and answer tokens worth handing over in one call

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.stops = model, tokenizer, stop_ids(model.generation_config, tokenizer)
        self.pad = self.stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id      # any will do: never looked at
        # Replaces the checkpoint's own settings, which may hold a top-k, a top-p or a repetition penalty.
        self.settings = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, return_dict_in_generate=True,
                                         eos_token_id=self.stops, pad_token_id=self.pad)

    def sync(self, adapter_dir: Path, version: int) -> None:
        """Nothing to do: the model is shared."""

    def sleep(self) -> None:
        """Nothing to do: it holds no memory between calls."""

    def generate(self, prompts, n: int, temperature: float, max_new_tokens: int, seed: int) -> list[list[Rollout]]:
        """n rollouts [P][n] of each prompt (token ids). The same arguments give the same rollouts on the same machine."""
        torch.manual_seed(seed)
        groups: list[list[Rollout]] = [[] for _ in prompts]
        waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))           # similar lengths together: less padding
        while waiting:
            rows = max(1, CACHE_TOKENS // (len(prompts[waiting[0]]) + max_new_tokens))
            batch, waiting = waiting[:max(1, rows // n)], waiting[max(1, rows // n):]
            for done in range(0, n, rows):                                              # more than once only if n > rows
                made = self._generate([prompts[i] for i in batch], min(rows, n - done), temperature, max_new_tokens)
                for i, rollouts in zip(batch, made):
                    groups[i] += rollouts
        return groups

    @torch.no_grad()
    def _generate(self, prompts, n: int, temperature: float, max_new_tokens: int) -> list[list[Rollout]]:
        device, longest, pad = self.model.device, max(map(len, prompts)), self.pad
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=device)         # (P, L) padded left
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)     # (P, L)
        cache = None
        if longest > 1 and n > 1:       # read each prompt once, not n times: its n answers start from copies of one cache
            positions = (mask.cumsum(-1) - 1).clamp(min=0)                                                 # (P, L)
            cache = self.model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1],
                               use_cache=True, logits_to_keep=1).past_key_values
            if _copies(cache):
                cache.batch_repeat_interleave(n)
            else:
                cache = None            # read the prompt n times
        ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)                              # (P*n, L)
        self.model.generation_config = self.settings
        rows, drawn, logprobs = list(range(len(ids))), [[] for _ in ids], [[] for _ in ids]                # rows: still unfinished
        for made in range(0, max_new_tokens, STAGE_TOKENS):
            recorder, known = _Recorder(temperature), ids.shape[1]
            self.settings.max_new_tokens = min(STAGE_TOKENS, max_new_tokens - made)
            stage = self.model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache,
                                        generation_config=self.settings, logits_processor=[recorder])
            new = stage.sequences[:, known:]                                                               # (rows, new)
            for row, tokens, values in zip(rows, new.tolist(), recorder.finish(stage.sequences)):
                drawn[row] += tokens
                logprobs[row] += values
            on = [i for i, tokens in enumerate(new.tolist()) if not set(tokens) & set(self.stops)]
            if not on or made + STAGE_TOKENS >= max_new_tokens:
                break
            rows, ids, mask = [rows[i] for i in on], stage.sequences[on], torch.cat([mask, torch.ones_like(new)], 1)[on]
            cache = stage.past_key_values if _copies(stage.past_key_values) else None                      # None: read it all again
            del stage                                                                                      # and its cache
            if cache is not None:
                cache.batch_select_indices(torch.tensor(on, device=device))
        rollouts = [make_rollout(prompts[row // n], *answer, self.stops, self.tokenizer) for row, answer in enumerate(zip(drawn, logprobs))]
        return [rollouts[i:i + n] for i in range(0, len(rollouts), n)]


def _copies(cache) -> bool:
    """Can the cache's rows be copied and dropped? The state of linear attention cannot."""
    return cache is not None and not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


class _Recorder(LogitsProcessor):
    """Applies the temperature and notes each chosen token's log-probability, one step's logits at a time."""

    def __init__(self, temperature: float):
        self.temperature, self.last, self.chosen = temperature, None, []

    def __call__(self, input_ids, scores):
        if self.last is not None:
            self.chosen.append(self.last.gather(-1, input_ids[:, -1:]))                         # (B, 1)
        self.last = (scores / self.temperature).log_softmax(-1)                                 # (B, V)
        if self.last[:, 0].isnan().any():                   # one bad logit makes its whole row NaN
            raise policy.BrokenPolicy("the policy's probabilities are NaN or infinite; the learning rate was probably too high")
        return self.last

    def finish(self, sequences) -> list[list[float]]:
        self.chosen.append(self.last.gather(-1, sequences[:, -1:]))
        return torch.cat(self.chosen, 1).tolist()


# ---------------------------------------------------------------- vLLM

class VLLMSampler:
    """Samples with vLLM, in this process. Each policy version is a fresh adapter name, id and folder in RAM.

    Fresh on all three counts, because vLLM keeps an adapter by its id and cached prompt blocks by its name: a reused one
    would silently serve the old policy.
    """

    block_tokens = 16 * CACHE_TOKENS      # it schedules its rows itself, and a large call keeps it busy

    def __init__(self, base: str, tokenizer, stops: list[int], *, dtype: str, lora_rank: int, context: int, gpu_memory: float,
                 sleeps: bool = False):
        """base: folder or hub id, never 4-bit (see `policy.dequantised_copy`). context: tokens of the longest prompt and
        answer. gpu_memory: share of the GPU. sleeps: `sleep` is used, and gives that share back for a while.
        """
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")        # in this process: starts faster, deterministic
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(f"vLLM does not fit what else is installed ({error}); pip install -r requirements.txt in a new "
                            "environment, or take --sampler hf") from error

        if lora_rank > LORA_RANKS[-1]:
            raise UserError(f"--lora-rank is {lora_rank}, but vLLM serves ranks up to {LORA_RANKS[-1]}; lower it or take --sampler hf")
        rank = min(r for r in LORA_RANKS if r >= lora_rank)
        on_gpu = torch.cuda.is_available()
        # A prompt that is read in two parts makes vLLM rewind its request's random numbers, which a CPU's cannot.
        placed = {"gpu_memory_utilization": gpu_memory} if on_gpu else {
            "kv_cache_memory_bytes": CPU_CACHE_BYTES, "enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, context)}
        try:
            self.engine = LLM(base, dtype=dtype, enable_lora=True, max_loras=1, max_lora_rank=rank, max_model_len=context,
                              logprobs_mode="processed_logprobs", generation_config="vllm", enforce_eager=not on_gpu, seed=0,
                              enable_sleep_mode=sleeps, **placed)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"vLLM could not start on {base} with a context of {context} tokens ({str(error).splitlines()[0]}); on a "
                            "GPU too small lower --gpu-memory or --max-new-tokens, or take --sampler hf") from error
        self.tokenizer, self.stops, self.adapter, self.sleeps, self.asleep = tokenizer, stops, None, sleeps, False
        self.adapter_root = adapter_folder()
        atexit.register(shutil.rmtree, self.adapter_root, ignore_errors=True)

    def sync(self, adapter_dir: Path, version: int) -> None:
        """Sample from the adapter in adapter_dir from now on; version must never have been used before."""
        from vllm.lora.request import LoRARequest

        if self.asleep:
            self.engine.wake_up()
            self.asleep = False
        if self.adapter is not None:
            self.engine.llm_engine.remove_lora(self.adapter.lora_int_id)
            if Path(self.adapter.lora_path).parent == self.adapter_root:
                shutil.rmtree(self.adapter.lora_path, ignore_errors=True)
        self.adapter = LoRARequest(f"policy-{version}", version + 1, str(adapter_dir))

    def sleep(self) -> None:
        """With `sleeps`: leave the GPU to the learner until the next `sync`. Level 1: the weights wait in RAM (level 2 breaks LoRA)."""
        if self.sleeps:
            self.engine.sleep(level=1)
            self.asleep = True

    def generate(self, prompts, n: int, temperature: float, max_new_tokens: int, seed: int) -> list[list[Rollout]]:
        """n rollouts [P][n] of each prompt (token ids), all in one call. Sample j of prompt i draws from seed + i n + j."""
        from vllm import SamplingParams, TokensPrompt

        settings = [SamplingParams(n=n, temperature=temperature, top_p=1.0, top_k=0, max_tokens=max_new_tokens, logprobs=0,
                                   detokenize=False, flat_logprobs=True, stop_token_ids=self.stops, seed=seed + i * n)
                    for i in range(len(prompts))]
        try:
            results = self.engine.generate([TokensPrompt(prompt_token_ids=list(p)) for p in prompts], settings,
                                           lora_request=self.adapter, use_tqdm=False)
        except Exception as error:      # a dead engine raises many kinds; whichever it is, sampling is over
            raise UserError(f"vLLM stopped working ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})") from error
        groups = [[make_rollout(prompt, list(output.token_ids), output.logprobs.logprobs, self.stops, self.tokenizer)
                   for output in sorted(result.outputs, key=lambda output: output.index)]
                  for prompt, result in zip(prompts, results)]
        if any(value != value for group in groups for rollout in group for value in rollout.logprobs):
            raise policy.BrokenPolicy("the policy's probabilities are NaN; the learning rate was probably too high")
        return groups


def adapter_folder() -> Path:
    """A fresh folder for adapters, in RAM where that is a folder too.

    Removes those of processes that were killed: only a living one locks its own.
    """
    ram = Path("/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir())
    for old in ram.glob("rspo-adapters-*"):
        with suppress(OSError):                             # locked, just gone, or another user's
            handle = os.open(old, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                os.close(handle)
    made = Path(tempfile.mkdtemp(prefix=".rspo-adapters-", dir=ram))
    fcntl.flock(os.open(made, os.O_RDONLY), fcntl.LOCK_EX)  # open, and so locked, until this process ends
    return made.rename(ram / made.name[1:])


def make_rollout(prompt, ids, logprobs, stops, tokenizer) -> Rollout:
    """A rollout of what was generated, cut behind its first end token: what follows it is padding."""
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    finished = end is not None
    ids = tuple(ids[:end + 1] if finished else ids)
    text = tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=False)
    return Rollout(tuple(prompt), ids, tuple(logprobs[:len(ids)]), text, finished)


# ---------------------------------------------------------------- which one

def pick_sampler(wanted: str) -> str:
    """"vllm" or "hf" for --sampler auto, vllm or hf. Raises UserError where vLLM is asked for and missing."""
    installed = importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" and not installed:
        raise UserError("--sampler vllm: vLLM is not installed; pip install -r requirements.txt (GPU), or take --sampler hf")
    if wanted == "auto" and torch.cuda.is_available() and not installed:
        print("vLLM is not installed: sampling with transformers, which is slower (pip install -r requirements.txt)")
    return wanted if wanted != "auto" else "vllm" if installed and torch.cuda.is_available() else "hf"


def open_sampler(args: argparse.Namespace, problems: list[Problem]):
    """A sampler of args.model as it is on disk, and the prompts [P] of problems."""
    base, adapter = policy.resolve_model(args.model)
    if pick_sampler(args.sampler) == "hf":
        model, tokenizer = policy.load_model(args.model, args.dtype, load_in_4bit=args.load_in_4bit)
        return HFSampler(model, tokenizer), encode_prompts(problems, tokenizer, context_length(model.config), args.max_new_tokens)
    if args.load_in_4bit:
        model, tokenizer = policy.load_model(base, args.dtype, load_in_4bit=True)
        base = str(policy.dequantised_copy(model, tokenizer))
        del model
    tokenizer = policy.load_tokenizer(base)
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    prompts = encode_prompts(problems, tokenizer, context_length(config), args.max_new_tokens)
    try:
        settings = GenerationConfig.from_pretrained(base)
    except OSError:                                         # the checkpoint has none
        settings = GenerationConfig.from_model_config(config)
    rank = policy.read_adapter(adapter)["r"] if adapter else 8
    sampler = VLLMSampler(base, tokenizer, stop_ids(settings, tokenizer), dtype=policy.pick_dtype(args.dtype), lora_rank=rank,
                          context=max(map(len, prompts)) + args.max_new_tokens, gpu_memory=0.9)
    if adapter:
        sampler.sync(adapter, 0)
    return sampler, prompts


# ---------------------------------------------------------------- the script, and what it shares with evaluate and train

def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser described by the first paragraph of a script's docstring, whose errors are one sentence too."""
    layout = lambda prog: argparse.MetavarTypeHelpFormatter(prog, max_help_position=36, width=150)
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0], usage="%(prog)s [flags]", formatter_class=layout)

    def refuse(message: str):
        raise UserError(f"{message}; see --help")

    parser.error = refuse
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that train.py, sample.py and evaluate.py share. None = follows from the model's task (`fill_in`)."""
    group = parser.add_argument_group("model and sampling")
    group.add_argument("--data", type=str, help="data set: countdown, countdown-graded, math, gsm8k, math500, ..., a hub data set or a .jsonl; "
                       "':train' and ':test' take a fixed part, ':1-3' these levels (toy: countdown, else math; evaluation: their held-out parts)")
    group.add_argument("--n", type=int, help="answers sampled per problem (training 16, else 64)")
    group.add_argument("--temperature", type=float, help="sampling temperature, > 0 (default 1)")
    group.add_argument("--max-new-tokens", type=int, help="longest answer, in tokens (toy 12, else 2048)")
    group.add_argument("--sampler", type=str, choices=("auto", "vllm", "hf"),
                       help="what samples (default auto: vllm where CUDA and vLLM are there, else transformers' generate)")
    group.add_argument("--dtype", type=str, choices=("auto", "float32", "bfloat16"),
                       help="of the frozen base model (default auto: bfloat16 on CUDA, else float32)")
    group.add_argument("--load-in-4bit", action="store_true", default=None,
                       help="keep the base model in 4 bits (NF4, double quantisation; a run remembers it)")
    group.add_argument("--limit", type=int, help="use that many of the evaluation problems (toy 200, else all)")
    group.add_argument("--seed", type=int, help="of everything random (default 0)")


def is_toy(model: str) -> bool:
    return policy.resolve_model(model)[0] == str(policy.TOY)


def fill_in(args: argparse.Namespace, defaults: dict) -> None:
    """Give every flag that was left out (None) its default, and refuse sampling settings that cannot work."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, low in (("n", 1), ("max_new_tokens", 1), ("limit", 1)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name.replace('_', '-')} is {value}, but must be at least {low}")
    if not 0 <= args.seed < 10**5:          # training's seeds lie below 10**15, evaluation's from there on
        raise UserError(f"--seed is {args.seed}, but must lie in 0..{10**5 - 1}")
    if not 0 < args.temperature < float("inf"):
        raise UserError(f"--temperature is {args.temperature}, but must be above 0")


def sampling_defaults(model: str) -> dict:
    """Settings that follow from the model: of a run, its own; of the toy, Countdown's; else mathematics'."""
    for folder in (Path(model), Path(model).parent):
        if policy.read_run(folder):
            own = policy.run_flags(folder, ("eval_data", "limit", "temperature", "max_new_tokens", "sampler", "dtype",
                                            "load_in_4bit", "seed"))
            return {"data": own.pop("eval_data"), "n": 64, **own}
    toy = is_toy(model)
    return {"data": "countdown:test" if toy else "math500", "n": 64, "temperature": 1.0, "sampler": "auto", "dtype": "auto",
            "load_in_4bit": False, "max_new_tokens": 12 if toy else 2048, "limit": 200 if toy else None, "seed": 0}


def context_length(config) -> int:
    return getattr(config, "max_position_embeddings", None) or 10**9


def sample_problems(sampler, prompts, n: int, temperature: float, max_new_tokens: int, seed: int, label: str, start: int = 0):
    """Yield the n rollouts of each prompt from `start` on, in order, with a progress bar. Each block has seeds of its own."""
    block = block_size(sampler, prompts, n, max_new_tokens)
    with tqdm(total=len(prompts), initial=start, desc=label, unit="problem", leave=False, disable=None) as bar:
        for begin in range(start, len(prompts), block):
            groups = sampler.generate(prompts[begin:begin + block], n, temperature, max_new_tokens, seed + begin * n)
            yield from groups
            bar.update(len(groups))


def block_size(sampler, prompts, n: int, max_new_tokens: int) -> int:
    """Prompts handed to the sampler at a time."""
    return max(1, sampler.block_tokens // (n * (max(map(len, prompts)) + max_new_tokens)))


def settings_of(args: argparse.Namespace, data: str) -> dict:
    """All that decides which answers are drawn: part of every row of a samples file."""
    _, adapter = policy.resolve_model(args.model)
    return {"model": args.model, "checkpoint": adapter and adapter.name, "data": data, "sampler": pick_sampler(args.sampler),
            **{name: getattr(args, name) for name in ("n", "temperature", "max_new_tokens", "limit", "dtype", "load_in_4bit", "seed")}}


def rows_done(path: Path, settings: dict) -> int:
    """Whole rows in a samples file. Raises UserError if it was made with other settings."""
    lines = tasks.read_lines(path) if path.exists() else [""]
    if lines[0].startswith('{"id": ') and len(lines) == 1:              # killed within its first row
        return 0
    if lines != [""]:
        try:
            row = tasks.parse_row(lines[0])
            other = [name for name in settings if row[name] != settings[name]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line 1: not a row of this version's sample.py; move the file away") from error
        if other:
            raise UserError(f"{path} was made with {other[0]} = {row[other[0]]!r}, not {settings[other[0]]!r}: give another --out or "
                            "move it away")
    return len(lines) - 1               # behind the last newline: nothing, or half a row


def sample_to_file(path: Path, settings: dict, problems: list[Problem], sampler, prompts) -> None:
    """Append the missing rows to a samples file, each as it comes; what an interrupted block left is made again."""
    path.touch()
    with tasks.locked(path, f"{path} is being written by another process: wait for it, or give another --out"):
        _append_samples(path, settings, problems, sampler, prompts)


def _append_samples(path: Path, settings: dict, problems: list[Problem], sampler, prompts) -> None:
    done = rows_done(path, settings)
    if done == len(problems):
        return
    done -= done % block_size(sampler, prompts, settings["n"], settings["max_new_tokens"])
    os.truncate(path, sum(len((line + "\n").encode()) for line in tasks.read_lines(path)[:done]))
    groups = sample_problems(sampler, prompts, settings["n"], settings["temperature"], settings["max_new_tokens"], settings["seed"],
                             f"sampling {settings['model']} on {settings['data']}", start=done)
    for problem, group in zip(problems[done:], groups):
        row = {"id": problem.id, "task": problem.task, "problem": problem.question, "answer": problem.answer, **settings,
               "answers": [{"text": r.text, "finished": r.finished, "tokens": len(r.completion_ids)} for r in group]}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def ask(args: argparse.Namespace) -> None:
    """Print n answers to the question --ask, those that agree together and the most frequent first."""
    countdown = args.data.startswith("countdown")
    question = args.ask.strip().rstrip(":")
    if not question:
        raise UserError("--ask is empty; give a question")
    if countdown and not re.fullmatch(r"[1-9]{4}=[1-9][0-9]", question):
        raise UserError(f"--ask is {args.ask!r}, but {args.model} plays Countdown: give four numbers 1 to 9 and a target 10 to 99, such as 2357=22")
    problem = Problem("ask", f"{question}:" if countdown else question, question, args.data.split(":")[0] if countdown else "math")
    sampler, prompts = open_sampler(args, [problem])
    [rollouts] = sampler.generate(prompts, args.n, args.temperature, args.max_new_tokens, args.seed)
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(tasks.vote(rollout.text) if rollout.finished else "(cut off)", []).append(rollout)
    ranked = sorted(groups.items(), key=lambda group: -len(group[1]))
    for answer, agreeing in ranked:
        reward = ""
        if countdown:
            [[value]] = tasks.grade_all([problem], [[(agreeing[0].text, agreeing[0].finished)]])
            reward = f"   reward {value:.3g}"
        print(f"{len(agreeing):>4d} of {args.n}   {answer[:200]}{reward}")
    if not countdown:
        print(f"\none of the {len(ranked[0][1])} that agree on {ranked[0][0][:200]}:\n\n{ranked[0][1][0].text}")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=str, default="toy", help="toy, hub id, short name, local folder or run directory (default toy)")
    add_flags(parser)
    parser.add_argument("--out", type=Path, default=Path("samples.jsonl"), help="file to write (default samples.jsonl)")
    parser.add_argument("--ask", type=str, help="one question instead of --data: print its n answers, those that agree together, and write nothing")
    args = parser.parse_args()
    if args.ask and args.data:
        raise UserError("--ask brings its own question; leave --data out")
    fill_in(args, sampling_defaults(args.model))
    if args.ask is not None:
        ask(args)
        return
    if not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: there is no folder {args.out.parent}")
    problems, settings = tasks.load_problems(args.data, args.limit), settings_of(args, args.data)
    if rows_done(args.out, settings) < len(problems):
        sample_to_file(args.out, settings, problems, *open_sampler(args, problems))
    print(f"{args.out} holds {len(problems)} problems x {args.n} answers; next: python evaluate.py --model {args.out}")


def run_script(main) -> None:
    """Run a script's main: what the user can put right ends in one sentence and exit code 1, without a traceback."""
    name = Path(sys.argv[0]).name
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; nothing that was finished is lost", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_script(main)
