"""Rollouts and their samplers; as a script, a file of n answers per problem.

    python sample.py                                      the toy model
    python sample.py --model runs/NAME --n 64             for evaluate.py
    python sample.py --model runs/NAME --ask "1 + 1 = ?"  one question

A sampler draws from softmax(logits / temperature), nothing cut off: the gradient
is right only for what was sampled. It says how likely each token was.

Shapes: P prompts of at most L tokens, R answers of at most T, V vocabulary.
"""

from pathlib import Path

from lib import cli

SAMPLING = ("data", "model", "n", "temperature", "max_new_tokens", "sampler",
            "dtype", "load_in_4bit", "limit", "seed")
HEAD = (*SAMPLING, "checkpoint", "weights", "data_digest")  # of each row in a file
SETTINGS = {name: cli.SETTINGS[name] for name in SAMPLING} | {
    "out": cli.Setting("file to write", Path("samples.jsonl"), kind=Path),
    "ask": cli.Setting("one question instead of --data; writes nothing", kind=str)}
if __name__ == "__main__":
    cli.refuse_early(lambda: cli.parse(__doc__, SETTINGS))

import importlib.util
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lib import policy, run, tasks

CACHE_TOKENS = 2**18  # tokens that HFSampler holds at a time
NOT_FINITE = "the policy's probabilities are NaN or infinite"
REMEDIES = {  # what vLLM's error speaks of
    "ompiler": "install gcc and Python's headers (build-essential, python3-dev)",
    "gcc": "install Python's headers (python3-dev)",
    "No space left": "make room there or set TMPDIR to another folder",
    "emory": "lower --gpu-memory or --max-new-tokens, end what else is on the GPU"}
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can serve


@dataclass(frozen=True)
class Rollout:
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]  # with an end token iff the model stopped
    logprobs: tuple[float, ...]  # the sampler's own, in nats
    text: str  # the completion without its end token
    finished: bool  # False: cut off at max_new_tokens


class HFSampler:
    """Samples from the very model that learns: it is never out of date."""

    block = 64  # prompts worth handing over in one call

    def __init__(self, model, tokenizer, stops, temperature, max_new_tokens):
        self.model, self.stops = model, stops
        self.decode = lru_cache(1024)(tokenizer.decode)
        self.temperature, self.max_new_tokens = temperature, max_new_tokens

    def sync(self, model, version: int) -> None:
        """Nothing to do: the model is shared."""

    def generate(self, prompts, n: int, seed: int) -> list[list[Rollout]]:
        """n rollouts [P][n] of each prompt. The seed decides all."""
        if self.model.training:  # it was learning, and recomputed activations
            self.model.eval()
        randomness = torch.Generator(self.model.device).manual_seed(seed)
        groups = [[] for _ in prompts]
        waiting = [i for i in range(len(prompts)) for _ in range(n)]
        waiting.sort(key=lambda i: -len(prompts[i]))  # little padding
        most = policy.LOGITS_AT_ONCE // len(self.model.get_output_embeddings().weight)
        while waiting:
            tokens = len(prompts[waiting[0]]) + self.max_new_tokens
            batch = waiting[:max(1, min(most, CACHE_TOKENS // tokens))]
            waiting = waiting[len(batch):]
            with torch.no_grad(), policy.precision(self.model):  # as the learner computes
                answers = self._decode(prompts, batch, randomness)
            for i, rollout in zip(batch, answers):
                groups[i].append(rollout)
        return groups

    def _decode(self, prompts, batch: list[int], randomness) -> list[Rollout]:
        """An answer to prompts[i] for each i of the batch."""
        asked = list(dict.fromkeys(batch))
        tensor = partial(torch.tensor, device=self.model.device)
        ids = [tensor(prompts[i]) for i in asked]
        ids = pad_sequence(ids, True, -1, padding_side="left")  # (P, L)
        mask, ids = (ids >= 0).long(), ids.clamp(min=0)  # (P, L), (P, L)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (P, L)

        # Equal answers share a row: S different texts, first the prompts.
        text = tensor([asked.index(i) for i in batch])  # (R,)
        cache, stops = None, tensor(self.stops)
        last = tensor([-1])  # a number would make a CPU copy the head per prompt
        rows = tensor(range(len(batch)))  # (R,)
        drawn = stops.new_full((len(rows), self.max_new_tokens), self.stops[0])
        logprobs = torch.zeros_like(drawn, dtype=torch.float)  # (R, T)
        for t in range(self.max_new_tokens):
            read = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions,
                past_key_values=cache, use_cache=True, logits_to_keep=last)
            cache, logits = read.past_key_values, read.logits[:, -1].float()
            logp = (logits / self.temperature).log_softmax(-1)  # (S, V)
            if logp[:, 0].isnan().any():  # one bad logit makes all NaN
                raise policy.BrokenPolicy(NOT_FINITE)
            token = logp.exp()[text].multinomial(1, generator=randomness)[:, 0]  # (R,)
            drawn[rows, t], logprobs[rows, t] = token, logp[text, token]
            alive = ~torch.isin(token, stops)  # (R,)
            if not alive.any():
                break
            rows, size = rows[alive], logp.shape[-1]
            grown = (text * size + token)[alive]  # (R,)  text and token as one
            grown, text = grown.unique(return_inverse=True)  # (S,), (R,)
            before, ids = grown // size, grown[:, None] % size  # (S,), (S, 1)
            if not torch.equal(before, torch.arange(len(mask), device=before.device)):
                cache.reorder_cache(before)  # some part, and finished ones leave
            mask = pad(mask[before], (0, 1), value=1)  # (S, L + t + 1)
            positions = positions[before, -1:] + 1  # (S, 1)
        return [make_rollout(prompts[i], *answer, self.stops, self.decode)
                for i, *answer in zip(batch, drawn.tolist(), logprobs.tolist())]


def make_rollout(prompt, ids, logprobs, stops, decode) -> Rollout:
    """Of what was drawn; behind its first end token it is padding."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    whole, logprobs = tuple(ids[:end + 1]), tuple(logprobs[:end + 1])
    text = decode(whole[:end])
    return Rollout(tuple(prompt), whole, logprobs, text, end < len(ids))


class VLLMSampler:
    """Samples with vLLM, in this process, from adapters in `folder`.

    Each version has a new name, id and folder: vLLM keeps an adapter by its id
    and prompt blocks by its name, and would serve the old policy.
    """

    block = 1024  # a large call keeps it busy

    def __init__(self, base: str, tokenizer, stops, temperature, max_new_tokens, *,
                 dtype, rank, context, gpu_memory, folder: Path):
        """base: not in 4 bits. context: tokens of the longest prompt and answer."""
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if rank > LORA_RANKS[-1]:
            cli.fail(f"--lora-rank is {rank}, vLLM serves at most {LORA_RANKS[-1]}")
        place = {"gpu_memory_utilization": gpu_memory}
        if not torch.cuda.is_available():
            # On a CPU vLLM cannot rewind random numbers for half a prompt.
            place = dict(kv_cache_memory_bytes=2**30, enforce_eager=True,
                         enable_chunked_prefill=False,
                         max_num_batched_tokens=max(4096, context))
        print("starting vLLM: the first time this takes minutes")
        try:
            from vllm import LLM
            self.engine = LLM(
                base, dtype=dtype, seed=0, max_model_len=context,
                enable_lora=True, max_loras=1,
                max_lora_rank=min(each for each in LORA_RANKS if each >= rank),
                logprobs_mode="processed_logprobs", generation_config="vllm", **place)
        except Exception as error:  # a dozen kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            known = (text for word, text in REMEDIES.items() if word in str(error))
            cli.fail(f"vLLM could not start on {base} with {context} tokens of context "
                     f"({reason}); {next(known, 'reinstall it')}, or take --sampler hf")
        self.tokenizer, self.stops, self.folder = tokenizer, stops, folder
        self.adapter = None
        self.settings = dict(
            temperature=temperature, top_p=1.0, top_k=0, logprobs=0,
            max_tokens=max_new_tokens, stop_token_ids=stops,
            flat_logprobs=True, detokenize=False)

    def sync(self, model, version: int) -> None:
        """Sample from model's adapter as it is now. No version comes twice."""
        from vllm.lora.request import LoRARequest
        if self.adapter:
            self.engine.llm_engine.remove_lora(self.adapter.lora_int_id)
        shutil.rmtree(self.folder, ignore_errors=True)  # of a killed run, too
        path = self.folder / f"version-{version}"
        model.save_pretrained(path)
        self.adapter = LoRARequest(path.name, version + 1, str(path))

    def generate(self, prompts, n: int, seed: int) -> list[list[Rollout]]:
        """n rollouts [P][n]. Answer j of prompt i draws from seed + i n + j."""
        from vllm import SamplingParams, TokensPrompt
        settings = [SamplingParams(n=n, seed=seed + i * n, **self.settings)
                    for i in range(len(prompts))]
        asked = [TokensPrompt(prompt_token_ids=[*prompt]) for prompt in prompts]
        try:
            results = self.engine.generate(
                asked, settings, lora_request=self.adapter, use_tqdm=False)
        except Exception as error:  # a dead engine raises many kinds
            cli.fail(f"vLLM stopped working ({type(error).__name__}: {error})")
        groups = []
        for prompt, result in zip(prompts, results):
            answers = sorted(result.outputs, key=lambda each: each.index)
            groups.append([
                make_rollout(prompt, [*each.token_ids], each.logprobs.logprobs,
                             self.stops, self.tokenizer.decode) for each in answers])
            if any(x != x for rollout in groups[-1] for x in rollout.logprobs):
                raise policy.BrokenPolicy(NOT_FINITE)
        return groups


def stop_ids(model, tokenizer) -> list[int]:
    """What ends an answer: the tokenizer, the model, the chat template know.

    Qwen2.5-Math names <|endoftext|> alone, but ends its turns with <|im_end|>.
    """
    ends = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"},
                 {"role": "assistant", "content": "THE_ANSWER"}]
        chat = tokenizer.apply_chat_template(turns, tokenize=False)
        behind = chat.partition("THE_ANSWER")[2]
        first = tokenizer(behind, add_special_tokens=False).input_ids[:1]
        added = tokenizer.added_tokens_decoder
        stops |= {i for i in first if i in added and added[i].special}
    if stops == {None}:
        cli.fail("neither tokenizer nor settings name an end token, so every answer "
                 "would be cut off: add eos_token to tokenizer_config.json")
    return sorted(stops - {None})


def pick_sampler(wanted: str, dtype: str) -> str:
    """"vllm" or "hf". UserError where vLLM is asked for and cannot be had."""
    installed = importlib.util.find_spec("vllm") is not None
    on_gpu = wanted != "hf" and policy.pick_device() == "cuda"
    if wanted == "vllm" and not installed:
        cli.fail("--sampler vllm: vLLM is not installed (requirements.txt); take hf")
    if wanted == "vllm" and on_gpu and dtype == "float32":
        cli.fail("--dtype float32: vLLM's adapters have 16 bits; take --sampler hf")
    if wanted != "auto":
        return wanted
    if on_gpu and not installed:
        print("vLLM is not installed: sampling in plain PyTorch, which is slower")
    return "vllm" if on_gpu and installed and dtype != "float32" else "hf"


def make_sampler(args, model, tokenizer, problems: list, folder: Path, gpu_memory):
    """The sampler that args.sampler names; vLLM's adapters go to folder."""
    common = stop_ids(model, tokenizer), args.temperature, args.max_new_tokens
    if args.sampler == "hf":
        return HFSampler(model, tokenizer, *common)
    base, dtype = run.resolve_model(args.model)[0], policy.pick_dtype(args.dtype)
    ranks = [config.r for config in getattr(model, "peft_config", {}).values()]
    context = max(len(p.prompt_ids) for p in problems) + args.max_new_tokens
    with tempfile.TemporaryDirectory() as copy:
        if args.load_in_4bit:
            policy.write_dequantised(base, dtype, copy)
            base = copy
        return VLLMSampler(
            base, tokenizer, *common, dtype=dtype, rank=max(ranks, default=8),
            context=context, gpu_memory=gpu_memory, folder=folder)


def open_sampler(args, problems: list):
    """A sampler of args.model as on disk; the problems with prompt_ids."""
    base, adapter = run.resolve_model(args.model)
    read = args.sampler == "vllm"  # and nothing more
    model, tokenizer = policy.load_model(
        base, adapter, args.dtype, "cpu" if read or cli.is_toy(base) else None,
        load_in_4bit=args.load_in_4bit and not read)
    problems = tasks.encode(problems, tokenizer, model.config, args.max_new_tokens)
    folder = tempfile.TemporaryDirectory(prefix="rspo-adapter-")
    sampler = make_sampler(args, model, tokenizer, problems, Path(folder.name), 0.9)
    sampler.temporary = folder  # goes with it
    if hasattr(model, "peft_config"):
        sampler.sync(model, version=0)
    return sampler, problems


def stream(*place) -> int:
    """Seed of what is drawn at one place (run's seed, purpose, step, ...)."""
    return int(cli.digest(place)[:14], 16)


def sample_blocks(sampler, problems: list, n: int, place: tuple, label: str, start=0):
    """Yield the rollouts [..][n] of the problems from `start` on."""
    starts = range(start, len(problems), sampler.block)
    for begin in tqdm(starts, desc=label, leave=False, disable=None):
        prompts = [p.prompt_ids for p in problems[begin:begin + sampler.block]]
        yield sampler.generate(prompts, n, stream(*place, begin))


# -------- the script

def settle(args) -> None:
    """What was not given is the run's own, else follows from the model."""
    args.model = args.model or "toy"
    toy = cli.is_toy(run.resolve_model(args.model)[0])
    own = run.flags_of(args.model)
    data = own.get("eval_data", "divisor:test" if toy else "math500")
    cli.settle(args, SETTINGS, toy, {**own, "n": 64, "data": data})
    args.sampler = pick_sampler(args.sampler, args.dtype)
    args.dtype = policy.pick_dtype(args.dtype)


def weights_of(base: str, adapter: Path | None) -> str:
    """Digest of a checkpoint's checksums, or of its files' sizes and times."""
    known = [] if Path(base).is_dir() else [base]
    for folder in filter(None, (Path(base), adapter)):
        if (folder / "state.json").is_file():
            known.append((folder / "state.json").read_text())
        else:
            known += [(path.name, path.stat().st_size, path.stat().st_mtime_ns)
                      for path in sorted(folder.glob("*"))
                      if path.suffix in (".safetensors", ".json", ".jinja")]
    return cli.digest(known)[:16]


def head_of(args, problems: list) -> dict:
    """All that decides the answers of a samples file."""
    base, adapter = run.resolve_model(args.model)
    return {**{name: getattr(args, name) for name in SAMPLING},
            "checkpoint": adapter and adapter.name, "weights": weights_of(base, adapter),
            "data_digest": tasks.digest_of(problems)}


def rows_done(path: Path, head: dict) -> int:
    """Whole rows in a samples file. UserError unless each has this head."""
    rows = cli.read_rows(path, appended=True)
    begun = path.read_bytes()[:9] if path.exists() and not rows else b""
    if not b'{"data": '.startswith(begun):
        cli.fail(f"{path} is not a file of sample.py; move it away")
    for number, row in rows:
        for name, value in head.items():
            if row.get(name) != value:
                cli.fail(f"{path} was made with {name} = {row.get(name)!r}, not {value!r} "
                         f"(line {number}): move it away or give another --out")
    return len(rows)


def sample_file(args, path: Path, problems: list, head: dict) -> None:
    """Have the answers to the problems in a file; what is there stays.

    A block that was interrupted is made again, so that the bytes are the same.
    """
    if rows_done(path, head) >= len(problems):
        return print(f"{path} is complete: not sampled again (delete it to do so)")
    sampler, problems = open_sampler(args, problems)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with run.lock(path, f"{path} is in use by another process: give another --out"):
        done = rows_done(path, head) // sampler.block * sampler.block
        lines = path.read_bytes().split(b"\n")[:done]
        os.truncate(path, sum(len(line) + 1 for line in lines))
        place = args.seed, "sample", args.data
        label = f"sampling {args.model}"
        for groups in sample_blocks(sampler, problems, args.n, place, label, done):
            cli.write_rows(path, [
                {**head, "id": p.id, "problem": p.question, "answer": p.answer,
                 "answers": [{"text": r.text, "finished": r.finished} for r in group]}
                for p, group in zip(problems[done:], groups)])
            done += len(groups)


def ask(args) -> None:
    """Print the answers to a question, most frequent first, and one in full."""
    prompt = f"{args.ask}:" if tasks.split_name(args.data)[0] in tasks.GAMES else None
    problem = tasks.Problem("ask", args.ask, "", prompt=prompt)
    sampler, [problem] = open_sampler(args, [problem])
    [group] = sampler.generate([problem.prompt_ids], args.n, stream(args.seed, "ask"))
    said = Counter(tasks.vote(r.text) if r.finished else "(cut off)" for r in group)
    for answer, count in said.most_common():
        print(f"{count:>4d} of {args.n}   {answer[:200]}")
    print(f"\nthe first one in full:\n\n{group[0].text}")


def main(argv=None) -> None:
    args = cli.parse(__doc__, SETTINGS, argv)
    if args.ask is not None and (args.data or not args.ask.strip()):
        cli.fail("--ask must be a question, and brings its own: leave --data out")
    settle(args)
    if args.ask is not None:
        return ask(args)
    problems = tasks.load_problems(args.data, args.limit)
    sample_file(args, args.out, problems, head_of(args, problems))
    print(f"next: python evaluate.py --model {args.out}")


if __name__ == "__main__":
    cli.run_script(main)
