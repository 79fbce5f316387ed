"""Rollouts and their samplers; as a script, n answers to each problem in a file.

    python sample.py                                      the toy model
    python sample.py --model runs/NAME --n 64             for evaluate.py
    python sample.py --model runs/NAME --ask "1 + 1 = ?"  one question

A sampler draws from softmax(logits / temperature) over the whole vocabulary, nothing cut off: the
gradient is right only for what was sampled. It says how likely each token was, so that the learner
can be held against it.

Shapes: P prompts, n answers of each, R answers still being written, V vocabulary, T new tokens.
"""

from pathlib import Path

from lib import cli

SAMPLING = ("model", "data", "n", "temperature", "max_new_tokens", "sampler", "dtype",
            "load_in_4bit", "limit", "seed")
SETTINGS = {**{name: cli.SETTINGS[name] for name in SAMPLING},
            "out": cli.Setting("file to write", Path("samples.jsonl"), kind=Path),
            "ask": cli.Setting("one question instead of --data; writes nothing", kind=str)}
if __name__ == "__main__":
    cli.refuse_early(lambda: cli.parse(__doc__, SETTINGS))

import hashlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass

import torch
from tqdm import tqdm

from lib import policy, run, tasks
from lib.cli import UserError
from lib.tasks import Problem

CACHE_TOKENS = 2**18  # prompt and answer tokens that the plain sampler holds at a time
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM can be built for


@dataclass(frozen=True)
class Rollout:
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]  # ends with an end token iff the model stopped by itself
    logprobs: tuple[float, ...]  # of completion_ids, the sampler's own, in nats
    text: str  # the completion without its end token
    finished: bool  # False: cut off at max_new_tokens


# ---------------------------------------------------------------- plain PyTorch

class HFSampler:
    """Samples from the very model that learns, one token at a time: it is never out of date."""

    block = 64  # prompts worth handing over in one call

    def __init__(self, model, tokenizer, stops: list[int], temperature: float, max_new_tokens: int):
        self.model, self.tokenizer, self.stops = model, tokenizer, stops
        self.temperature, self.max_new_tokens = temperature, max_new_tokens

    def sync(self, model, version: int) -> None:
        """Nothing to do: the model is shared."""

    def generate(self, prompts, n: int, seed: int) -> list[list[Rollout]]:
        """n rollouts [P][n] of each prompt (token ids). The same arguments give the same again."""
        self.model.eval()
        randomness = torch.Generator(self.model.device).manual_seed(seed)
        groups: list[list[Rollout]] = [[] for _ in prompts]
        waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # little padding
        while waiting:
            fit = max(1, CACHE_TOKENS // (len(prompts[waiting[0]]) + self.max_new_tokens))
            batch, waiting = waiting[:max(1, fit // n)], waiting[max(1, fit // n):]
            for done in range(0, n, fit):  # once, where n answers fit
                answers = self._decode([prompts[i] for i in batch], min(fit, n - done), randomness)
                for i, rollouts in zip(batch, answers):
                    groups[i] += rollouts
        return groups

    @torch.no_grad()
    def _decode(self, prompts, n: int, randomness: torch.Generator) -> list[list[Rollout]]:
        device, longest = self.model.device, max(map(len, prompts))
        ids = [[0] * (longest - len(p)) + list(p) for p in prompts]  # padded left
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        ids, mask = torch.tensor(ids, device=device), torch.tensor(mask, device=device)  # (P, L)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (P, L)

        # Read each prompt once; its n answers start from n copies of what was read.
        read = self.model(input_ids=ids, attention_mask=mask, position_ids=positions,
                          use_cache=True, logits_to_keep=1)
        copies = torch.arange(len(prompts), device=device).repeat_interleave(n)  # (R,)  R = P n
        cache, logits, mask = read.past_key_values, read.logits[copies, -1], mask[copies]
        cache.reorder_cache(copies)
        position = positions[copies, -1:]  # (R, 1)

        stops = torch.tensor(self.stops, device=device)
        drawn = stops.new_full((len(copies), self.max_new_tokens), self.stops[0])  # (P n, T)
        logprobs = torch.zeros(drawn.shape, device=device)  # (P n, T)
        rows = torch.arange(len(copies), device=device)  # (R,)
        for t in range(self.max_new_tokens):
            logp = (logits.float() / self.temperature).log_softmax(-1)  # (R, V)
            if logp[:, 0].isnan().any():  # one bad logit makes its whole row NaN
                raise policy.BrokenPolicy("the policy's probabilities are NaN or infinite")
            token = torch.multinomial(logp.exp(), 1, generator=randomness)  # (R, 1)
            drawn[rows, t] = token[:, 0]
            logprobs[rows, t] = logp.gather(-1, token)[:, 0]
            alive = ~torch.isin(token[:, 0], stops)  # (R,)
            if t + 1 == self.max_new_tokens or not alive.any():
                break
            if not alive.all():  # finished answers leave
                rows, token, mask, position = (x[alive] for x in (rows, token, mask, position))
                cache.reorder_cache(alive.nonzero()[:, 0])
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)  # (R, L + t + 1)
            position = position + 1
            logits = self.model(input_ids=token, attention_mask=mask, position_ids=position,
                                past_key_values=cache, use_cache=True).logits[:, -1]  # (R, V)

        rollouts = [make_rollout(prompts[i // n], *answer, self.stops, self.tokenizer)
                    for i, answer in enumerate(zip(drawn.tolist(), logprobs.tolist()))]
        return [rollouts[i:i + n] for i in range(0, len(rollouts), n)]


def make_rollout(prompt, ids, logprobs, stops, tokenizer) -> Rollout:
    """A rollout of what was drawn, cut behind its first end token: what follows it is padding."""
    end = next((i for i, token in enumerate(ids) if token in stops), None)
    finished = end is not None
    ids = tuple(ids[:end + 1] if finished else ids)
    text = tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=False)
    return Rollout(tuple(prompt), ids, tuple(logprobs[:len(ids)]), text, finished)


# ---------------------------------------------------------------- vLLM

class VLLMSampler:
    """Samples with vLLM, in this process, from adapters in `folder`.

    Each version of the policy is an adapter of a new name, id and folder: vLLM keeps an adapter
    by its id and prompt blocks by its name, and a reused one would serve the old policy.
    """

    block = 1024  # it schedules its rows itself, and a large call keeps it busy

    def __init__(self, base: str, tokenizer, stops: list[int], temperature: float,
                 max_new_tokens: int, *, dtype, rank, context, gpu_memory, folder: Path):
        """base: never in 4 bits. context: tokens of the longest prompt and answer."""
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if rank > LORA_RANKS[-1]:
            raise UserError(f"--lora-rank is {rank}, but vLLM serves at most {LORA_RANKS[-1]}")
        place = {"gpu_memory_utilization": gpu_memory}
        if not torch.cuda.is_available():
            # A prompt read in two parts makes vLLM rewind random numbers, which a CPU cannot.
            place = {"kv_cache_memory_bytes": 2**30, "enforce_eager": True,
                     "enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, context)}
        try:
            from vllm import LLM
            self.engine = LLM(base, dtype=dtype, enable_lora=True, max_loras=1, seed=0,
                              max_lora_rank=min(each for each in LORA_RANKS if each >= rank),
                              max_model_len=context, logprobs_mode="processed_logprobs",
                              generation_config="vllm", **place)
        except (ImportError, RuntimeError, ValueError) as error:
            raise UserError(f"vLLM could not start on {base} with a context of {context} tokens "
                            f"({str(error).splitlines()[0]}); lower --gpu-memory or "
                            "--max-new-tokens, or take --sampler hf") from error
        self.tokenizer, self.stops, self.folder, self.adapter = tokenizer, stops, folder, None
        self.settings = {"temperature": temperature, "top_p": 1.0, "top_k": 0, "logprobs": 0,
                         "max_tokens": max_new_tokens, "stop_token_ids": stops,
                         "detokenize": False, "flat_logprobs": True}

    def sync(self, model, version: int) -> None:
        """Sample from model's adapter as it is now. No version comes twice."""
        from vllm.lora.request import LoRARequest
        if self.adapter:
            self.engine.llm_engine.remove_lora(self.adapter.lora_int_id)
        shutil.rmtree(self.folder, ignore_errors=True)  # also what a killed run has left
        path = self.folder / f"version-{version}"
        model.save_pretrained(path)
        self.adapter = LoRARequest(path.name, version + 1, str(path))

    def generate(self, prompts, n: int, seed: int) -> list[list[Rollout]]:
        """n rollouts [P][n] of each prompt. Answer j of prompt i draws from seed + i n + j."""
        from vllm import SamplingParams, TokensPrompt
        settings = [SamplingParams(n=n, seed=seed + i * n, **self.settings)
                    for i in range(len(prompts))]
        asked = [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts]
        try:
            results = self.engine.generate(asked, settings, lora_request=self.adapter,
                                           use_tqdm=False)
        except Exception as error:  # a dead engine raises many kinds: sampling is over
            raise UserError(f"vLLM stopped working ({type(error).__name__}: {error})") from error
        groups = []
        for prompt, result in zip(prompts, results):
            outputs = sorted(result.outputs, key=lambda output: output.index)
            groups.append([make_rollout(prompt, list(o.token_ids), o.logprobs.logprobs, self.stops,
                                        self.tokenizer) for o in outputs])
        if any(x != x for group in groups for rollout in group for x in rollout.logprobs):
            raise policy.BrokenPolicy("the policy's probabilities are NaN or infinite")
        return groups


# ---------------------------------------------------------------- which one

def stop_ids(model, tokenizer) -> list[int]:
    """All tokens that end an answer: the tokenizer's, the model's, and the chat template's.

    Qwen2.5-Math names <|endoftext|> alone, but ends a chat's answer with <|im_end|>.
    """
    ends = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "the answer"}]
        chat = tokenizer.apply_chat_template(turns, tokenize=False)
        _, answered, behind = chat.rpartition("the answer")
        first = tokenizer(behind, add_special_tokens=False).input_ids[:1] if answered else []
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        stops |= special & set(first)
    if not stops:
        raise UserError("neither the tokenizer nor the generation settings name an end token, so "
                        "every answer would be cut off: add eos_token to tokenizer_config.json")
    return sorted(stops)


def pick_sampler(wanted: str) -> str:
    """"vllm" or "hf". UserError where vLLM is asked for and missing."""
    installed = importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" and not installed:
        raise UserError("--sampler vllm: vLLM is not installed (requirements.txt); take hf")
    if wanted == "auto" and torch.cuda.is_available() and not installed:
        print("vLLM is not installed: sampling in plain PyTorch, which is slower")
    on_gpu = installed and torch.cuda.is_available()
    return wanted if wanted != "auto" else "vllm" if on_gpu else "hf"


def make_sampler(args, model, tokenizer, problems: list[Problem], folder: Path, gpu_memory: float):
    """The sampler that args.sampler names, of model's base; vLLM's adapters go to folder."""
    stops = stop_ids(model, tokenizer)
    if args.sampler == "hf":
        return HFSampler(model, tokenizer, stops, args.temperature, args.max_new_tokens)
    dtype, base = policy.pick_dtype(args.dtype), run.resolve_model(args.model)[0]
    rank = max((config.r for config in getattr(model, "peft_config", {}).values()), default=8)
    context = max(len(p.prompt_ids) for p in problems) + args.max_new_tokens
    with tempfile.TemporaryDirectory() as copy:
        if args.load_in_4bit:
            policy.write_dequantised(base, dtype, copy)
            base = copy
        return VLLMSampler(base, tokenizer, stops, args.temperature, args.max_new_tokens,
                           dtype=dtype, rank=rank, context=context, gpu_memory=gpu_memory,
                           folder=folder)


def open_sampler(args, problems: list[Problem]):
    """A sampler of args.model as it is on disk, and the problems with their prompts' tokens."""
    aside = "cpu" if args.sampler == "vllm" else None  # only to be read
    model, tokenizer = policy.load_model(*run.resolve_model(args.model), args.dtype, aside,
                                         load_in_4bit=args.load_in_4bit and not aside)
    problems = tasks.encode(problems, tokenizer, model.config, args.max_new_tokens)
    folder = tempfile.TemporaryDirectory(prefix="rspo-adapter-")
    sampler = make_sampler(args, model, tokenizer, problems, Path(folder.name), gpu_memory=0.9)
    sampler.temporary = folder  # goes with it
    if hasattr(model, "peft_config"):
        sampler.sync(model, version=0)
    return sampler, problems


def stream(*place) -> int:
    """Seed of the random numbers that are drawn at one place (run's seed, purpose, step, ...)."""
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:7])


def sample_blocks(sampler, problems: list[Problem], n: int, place: tuple, label: str, start=0):
    """Yield the rollouts [..][n] of the problems from `start` on, a block at a time."""
    with tqdm(total=len(problems), initial=start, desc=label, leave=False, disable=None) as bar:
        for begin in range(start, len(problems), sampler.block):
            prompts = [p.prompt_ids for p in problems[begin:begin + sampler.block]]
            yield sampler.generate(prompts, n, stream(*place, begin))
            bar.update(len(prompts))


# ---------------------------------------------------------------- the script

def settle(args) -> None:
    """Settings that were not given follow from the model: of a run its own, else the task's."""
    args.model = args.model or "toy"
    own, toy = run.flags_of(args.model), run.resolve_model(args.model)[0] == str(run.TOY)
    data = own.get("eval_data", "divisor:test" if toy else "math500")
    cli.settle(args, SETTINGS, toy, {**own, "n": 64, "data": data})
    args.sampler = pick_sampler(args.sampler)


def settings_of(args, data: str) -> dict:
    """All that decides which answers are drawn: part of every row of a samples file."""
    base, adapter = run.resolve_model(args.model)
    weights = [path.stat().st_mtime_ns for path in Path(adapter or base).glob("*.safetensors")]
    own = {name: getattr(args, name) for name in SAMPLING if name != "data"}
    return {"data": data, "checkpoint": adapter and adapter.name,
            "weights_of": max(weights, default=None), **own}


def rows_done(path: Path, settings: dict) -> int:
    """Whole rows in a samples file. UserError if it was made with other settings."""
    if not path.exists():
        return 0
    rows = cli.read_rows(path, appended=True)
    if not rows and path.read_bytes() and not path.read_bytes().startswith(b'{"id": '):
        raise UserError(f"{path} is not a file of sample.py; move it away")
    for name, value in settings.items() if rows else ():
        if rows[0][1].get(name) != value:
            raise UserError(f"{path} was made with {name} = {rows[0][1].get(name)!r}, not "
                            f"{value!r}: give another --out or move it away")
    return len(rows)


def sample_files(args, jobs: dict[Path, str]) -> None:
    """Have n answers to each problem in a file for each data set; whole files stay as they are."""
    missing, problems = {}, []
    for path, data in jobs.items():
        settings, asked = settings_of(args, data), tasks.load_problems(data, args.limit)
        if rows_done(path, settings) < len(asked):
            missing[path], problems = (settings, len(asked)), problems + asked
        else:
            print(f"{path} is complete: not sampled again (delete it to do so)")
    if missing:
        sampler, problems = open_sampler(args, problems)
        for path, (settings, count) in missing.items():
            sample_to_file(path, settings, problems[:count], sampler)
            problems = problems[count:]


def sample_to_file(path: Path, settings: dict, problems: list[Problem], sampler) -> None:
    """Append the missing rows to a samples file; a block that was interrupted is made again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with run.lock(path, f"{path} is being written by another process: give another --out"):
        done = rows_done(path, settings)
        done -= done % sampler.block if done < len(problems) else 0
        os.truncate(path, sum(len(line) + 1 for line in path.read_bytes().split(b"\n")[:done]))
        label, n = f"sampling {settings['model']} on {settings['data']}", settings["n"]
        place = settings["seed"], "sample", settings["data"]
        for groups in sample_blocks(sampler, problems, n, place, label, done):
            answers = [[{"text": r.text, "finished": r.finished, "tokens": len(r.completion_ids)}
                        for r in group] for group in groups]
            cli.write_rows(path, [
                {"id": p.id, "task": p.task, "problem": p.question, "answer": p.answer, **settings,
                 "answers": group} for p, group in zip(problems[done:], answers)])
            done += len(groups)


def ask(args) -> None:
    """Print n answers to one question, those that agree together, the most frequent first."""
    sampler, [problem] = open_sampler(args, [tasks.question(args.ask, args.data)])
    [rollouts] = sampler.generate([problem.prompt_ids], args.n, stream(args.seed, "ask"))
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        answer = tasks.vote(rollout.text) if rollout.finished else "(cut off)"
        groups.setdefault(answer, []).append(rollout)
    ranked = sorted(groups.items(), key=lambda group: -len(group[1]))
    for answer, agreeing in ranked:
        reward = ""
        if problem.answer:  # a game tells right from wrong by itself
            [[value]], _ = tasks.grade_all([problem], [agreeing[:1]])
            reward = f"   reward {value:.3g}"
        print(f"{len(agreeing):>4d} of {args.n}   {answer[:200]}{reward}")
    if not problem.answer:
        print(f"\none of those that say {ranked[0][0][:200]}:\n\n{ranked[0][1][0].text}")


def main(argv: list[str] | None = None) -> None:
    args = cli.parse(__doc__, SETTINGS, argv)
    if args.ask is not None and args.data:
        raise UserError("--ask brings its own question: leave --data out")
    settle(args)
    if args.ask is not None:
        return ask(args)
    sample_files(args, {args.out: args.data})
    print(f"next: python evaluate.py --model {args.out}")


if __name__ == "__main__":
    cli.run_script(main)
