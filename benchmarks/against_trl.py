"""The same work through TRL 1.16's GRPOTrainer and through train.py: time and peak memory.

    make test-integrations                             makes .venv-trl, TRL's own environment
    export OMP_NUM_THREADS=1
    .venv/bin/python benchmarks/against_trl.py         the toy
    .venv/bin/python benchmarks/against_trl.py --model runs/smollm2 --data runs/divisors.jsonl \\
        --prompts 4 --max-new-tokens 64                after benchmarks/smollm2.py

Same model, prompts, n, lengths, LoRA, AdamW, micro-batch, number format and threads, in turn, A B A
B, each time in a process of its own. Learning: one update on given answers of exactly
--max-new-tokens random tokens, of which a share has a weight that is not 0; the gradients of the
two are compared. Whole step: sample, grade, learn and sync with rewards drawn at random (a quarter
right, in place of the grader's verdict, which is timed all the same). TRL runs
integrations/trl_rspo.py. Medians without each process's first step; peak memory is what a process
held at most beyond what it held before loading the model. Writes --out as JSON.

With --mean-length M instead sampling alone. Lengths differ as those of real answers do: they are
drawn from an exponential distribution of mean M, the same for both, and what either draws is
changed so that an answer of length l has its end token at place l and none before. Seconds are per
1,000 tokens; the matrix speed is two operations per parameter and token, over those of a large
matrix product in the same process.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RANK = 8
LR = {"learn": 1e-12, "step": 1e-4}     # given answers are given again: their policy must stay
PARTS = ("evaluate", "sample", "grade", "learn")        # evaluate: the sync, behind the first step


def peak_gb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ---------------------------------------------------------------- what both do alike

def start_model(work: dict, layers: str = "ours"):
    """(model with an adapter whose B is not 0, tokenizer, problems); TRL with PEFT's layers."""
    import torch
    from peft.tuners import lora

    from lib import policy, run, tasks
    base, _ = run.resolve_model(work["model"])
    model, tokenizer = policy.load_model(base, dtype="float32", device="cpu")
    problems = tasks.load_problems(work["data"])
    problems = tasks.encode(problems, tokenizer, model.config, work["answer"])
    model = policy.add_lora(model, RANK, seed=0)
    for module in model.modules():
        if layers == "peft" and type(module) is policy.LoraLinear:
            module.__class__ = lora.Linear
    if work["recompute"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    for parameter in policy.trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.02)
    return model, tokenizer, problems


def given_answers(work: dict, problems, vocabulary: int) -> tuple[list, list[float]]:
    """P * n rollouts of random tokens and their rewards, of which the first of each group are 1."""
    from sample import Rollout
    draw, rollouts, rewards = random.Random(0), [], []
    for problem in problems[:work["prompts"]]:
        for i in range(work["n"]):
            ids = tuple(draw.randrange(2, vocabulary) for _ in range(work["answer"]))
            rollouts.append(Rollout(problem.prompt_ids, ids, (), "", False))
            rewards.append(float(i < round(work["share"] * work["n"])))
    return rollouts, rewards


def scored(model, rollouts: list) -> list:
    """The rollouts with the log-probabilities that this model gives them."""
    import torch

    from lib import policy
    with torch.no_grad():
        found = [policy.token_logprobs(model, [rollout], 1.0)[0] for rollout in rollouts]
    return [replace(r, logprobs=tuple(each.tolist())) for r, each in zip(rollouts, found)]


def draw_rewards(share: float) -> None:
    """From now on the grader's verdicts, taken as always, are replaced by drawn ones."""
    from lib import tasks
    grade_all, draw = tasks.grade_all, random.Random(0)

    def drawn(problems, groups):
        rewards, failures = grade_all(problems, groups)
        return [[float(draw.random() < share) for _ in row] for row in rewards], failures

    tasks.grade_all = drawn


def save_gradients(path: str, parameters: dict) -> None:
    from safetensors.torch import save_file
    save_file({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}, path)


# ---------------------------------------------------------------- ours

def learn_ours(work: dict) -> dict:
    import torch

    import rspo
    from lib import policy
    before, taken = peak_gb(), []
    model, tokenizer, problems = start_model(work)
    rollouts, rewards = given_answers(work, problems, min(len(tokenizer), model.config.vocab_size))
    rollouts = scored(model, rollouts)
    tokens = work["rows"] * max(map(policy.length, rollouts))
    learner = policy.Learner(model, LR["learn"], 1.0, tokens)
    rewards = torch.tensor(rewards).reshape(-1, work["n"])                 # (P, n)
    for i in range(work["rounds"] + 1):
        begin = time.perf_counter()
        learner.update(rollouts, rspo.OBJECTIVES["passk"](rewards, 1).flatten())
        taken.append(time.perf_counter() - begin)
        if i == 0:
            save_gradients(work["gradients"], learner.named)
    return {"seconds": taken[1:], "peak_gb": peak_gb() - before}


def step_ours(work: dict) -> dict:
    import train
    from lib import run, tasks
    from transformers import AutoTokenizer
    draw_rewards(work["share"])
    before = peak_gb()
    tokenizer = AutoTokenizer.from_pretrained(run.resolve_model(work["model"])[0])
    problems = tasks.load_problems(work["data"])
    problems = tasks.encode(problems, tokenizer, SimpleNamespace(), work["answer"])
    longest = max(len(problem.prompt_ids) for problem in problems) + work["answer"]
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "model": work["model"], "data": work["data"], "prompts": work["prompts"],
            "n": work["n"], "max-new-tokens": work["answer"], "k": 4, "dtype": "float32",
            "sampler": "hf", "lora-rank": RANK, "lr": LR["step"], "steps": work["rounds"] + 1,
            "limit": 1, "eval-n": 2, "save-every": 1000,
            "micro-batch-tokens": work["rows"] * longest, "run": f"{folder}/run"}
        recompute = f"--{'' if work['recompute'] else 'no-'}gradient-checkpointing"
        train.main([f"--{name}={value}" for name, value in flags.items()] + [recompute])
        lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][1:]
    return {"seconds": [sum(row[f"{part}_seconds"] for part in PARTS) for row in rows],
            "peak_gb": peak_gb() - before,
            "tokens": statistics.mean(row["completion_tokens"] for row in rows)}


def end_at(lengths: list[int], end: int) -> None:
    """From now on row i of what is drawn has `end` at place lengths[i], and never before.

    Finished rows may leave or stay. Both samplers draw with multinomial, once per place.
    """
    import torch
    draw, place = torch._C.TensorBase.multinomial, 0

    def multinomial(probabilities, *rest, **named):         # (R, V) -> (R, 1)
        nonlocal place
        place, drawn = place + 1, draw(probabilities, *rest, **named)
        alive = [length for length in lengths if length >= place]
        last = torch.tensor(alive if len(drawn) == len(alive) else lengths)[:, None] == place
        return torch.where(last, end, drawn.masked_fill(drawn == end, end + 1))

    torch.multinomial = torch.Tensor.multinomial = multinomial


def timed_sampling(work: dict, model, end: int, generate) -> dict:
    """Of generate(round), which returns the tokens of each answer."""
    import torch
    taken, made, shares, speed, a = [], [], [], 0.0, torch.randn(1024, 1024)
    for _ in range(20):
        begin = time.perf_counter()
        a @ a
        speed = max(speed, 2 * 1024**3 / (time.perf_counter() - begin))
    size = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    for i in range(work["rounds"]):
        draw, rows = random.Random(i), work["prompts"] * work["n"]
        lengths = [min(work["answer"], 1 + int(draw.expovariate(1 / work["mean"])))
                   for _ in range(rows)]
        end_at(lengths, end)
        begin = time.perf_counter()
        answers = generate(i)
        taken.append((time.perf_counter() - begin) / sum(lengths) * 1000)
        if sorted(map(len, answers)) != sorted(lengths):
            sys.exit("the answers are not as long as they were meant to be")
        shares.append(2 * size * 1000 / taken[-1] / speed)
        made += lengths
    return {"seconds": taken, "tokens": statistics.mean(made),
            "share": statistics.median(shares)}


def sample_ours(work: dict) -> dict:
    import sample
    before = peak_gb()
    model, tokenizer, problems = start_model(work)
    end = tokenizer.eos_token_id
    sampler = sample.HFSampler(model, tokenizer, [end], 1.0, work["answer"])
    prompts = [p.prompt_ids for p in problems[:work["prompts"]]]
    found = timed_sampling(work, model, end, lambda i: [
        r.completion_ids for group in sampler.generate(prompts, work["n"], i) for r in group])
    return {**found, "peak_gb": peak_gb() - before}


# ---------------------------------------------------------------- TRL's

def trl_steps(work: dict, model, tokenizer, rows: list[dict], reward, k: int, **others):
    """Seconds of each step, whole, and of them those before learning; or the trainer, untrained."""
    import datasets
    from transformers import TrainerCallback

    from integrations.trl_rspo import GRPOConfig, RSPOTrainer

    class Timed(RSPOTrainer):
        prepared = 0.0

        def _prepare_inputs(self, batch):       # sampling and grading; on later micro-batches none
            begin = time.perf_counter()
            batch = super()._prepare_inputs(batch)
            self.prepared += time.perf_counter() - begin
            return batch

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **unused):
            trainer.prepared, self.begin = 0.0, time.perf_counter()

        def on_pre_optimizer_step(self, args, state, control, model, **unused):
            if state.global_step == 0 and work["mode"] == "learn":
                named = {name: p for name, p in model.named_parameters() if p.requires_grad}
                save_gradients(work["gradients"], named)

        def on_step_end(self, args, state, control, **unused):
            whole = time.perf_counter() - self.begin
            steps.append({"whole": whole, "prepared": trainer.prepared})

    steps: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, num_generations=work["n"],
            per_device_train_batch_size=work["rows"], max_steps=work["rounds"] + 1,
            gradient_accumulation_steps=work["prompts"] * work["n"] // work["rows"],
            max_completion_length=work["answer"], learning_rate=LR.get(work["mode"], 0.0),
            lr_scheduler_type="constant", adam_beta2=0.95, max_grad_norm=1.0, loss_type="luspo",
            scale_rewards="none", use_cpu=True, bf16=False,
            gradient_checkpointing=work["recompute"],
            gradient_checkpointing_kwargs={"use_reentrant": False}, report_to="none",
            save_strategy="no", logging_steps=10**6, disable_tqdm=True, shuffle_dataset=False,
            seed=0)
        trainer = Timed(model, reward, args, train_dataset=datasets.Dataset.from_list(rows),
                        processing_class=tokenizer, callbacks=[Watch()], k=k, **others)
        if work["mode"] == "sample":
            return trainer
        trainer.train()
    return steps


def learn_trl(work: dict) -> dict:
    import integrations.trl_rspo  # noqa: F401  (what is imported is not counted as memory)
    before = peak_gb()
    model, tokenizer, problems = start_model(work, "peft")
    made, rewards = given_answers(work, problems, min(len(tokenizer), model.config.vocab_size))
    given = lambda prompts, trainer: {
        "prompt_ids": [list(r.prompt_ids) for r in made],
        "completion_ids": [list(r.completion_ids) for r in made], "logprobs": None}
    steps = trl_steps(work, model, tokenizer, [{"prompt": "-"}] * work["prompts"],
                      lambda **unused: rewards, 1, rollout_func=given)
    return {"seconds": [step["whole"] - step["prepared"] for step in steps[1:]],
            "peak_gb": peak_gb() - before}


def step_trl(work: dict) -> dict:
    import integrations.trl_rspo  # noqa: F401
    import sample
    from lib import tasks
    draw_rewards(work["share"])
    before, lengths = peak_gb(), []
    model, tokenizer, problems = start_model(work, "peft")
    stops = model.generation_config.eos_token_id = sample.stop_ids(model, tokenizer)

    def reward(completions, completion_ids, problem, **unused):
        lengths.extend(map(len, completion_ids))
        answers = [[SimpleNamespace(text=text, finished=ids[-1] in stops)]
                   for text, ids in zip(completions, completion_ids)]
        rewards, _ = tasks.grade_all([problems[i] for i in problem], answers)
        return [value for [value] in rewards]

    rows = [{"prompt": tasks.render(p, tokenizer), "problem": i} for i, p in enumerate(problems)]
    steps = trl_steps(work, model, tokenizer, rows, reward, 4)
    return {"seconds": [step["whole"] for step in steps[1:]], "peak_gb": peak_gb() - before,
            "tokens": statistics.mean(lengths)}


def sample_trl(work: dict) -> dict:
    import integrations.trl_rspo  # noqa: F401
    import torch
    before = peak_gb()
    model, tokenizer, problems = start_model(work, "peft")
    end = model.generation_config.eos_token_id = tokenizer.eos_token_id
    prompts = [list(p.prompt_ids) for p in problems[:work["prompts"]] for _ in range(work["n"])]
    trainer = trl_steps(work, model, tokenizer, [{"prompt": "-"}] * work["prompts"],
                        lambda **unused: [], 1)
    torch.manual_seed(0)
    found = timed_sampling(work, model, end, lambda i: trainer._generate_single_turn(
        prompts, None, {}, work["n"])[0])
    return {**found, "peak_gb": peak_gb() - before}


CHILDREN = {("ours", "learn"): learn_ours, ("ours", "step"): step_ours,
            ("ours", "sample"): sample_ours, ("trl", "sample"): sample_trl,
            ("trl", "learn"): learn_trl, ("trl", "step"): step_trl}


# ---------------------------------------------------------------- side by side

def child(python: str, who: str, work: dict) -> dict:
    """On the CPU, where there is a GPU too."""
    command = [python, __file__, "--child", json.dumps({"who": who, **work})]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        sys.exit(f"{who}, {work['mode']} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(work: dict, pythons: dict, turns: int) -> dict:
    """Medians of each; in learning, also by how much the gradients differ."""
    runs = {who: [] for who in pythons}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(turns):
            for who, python in pythons.items():
                given = {**work, "gradients": f"{folder}/{who}"}
                runs[who].append(child(python, who, given))
        gap = gradient_gap(folder) if work["mode"] == "learn" else None
    medians = {who: {"seconds": statistics.median(s for each in own for s in each["seconds"]),
                     "peak_gb": statistics.median(each["peak_gb"] for each in own),
                     "tokens": own[0].get("tokens", work["answer"]),
                     "share": statistics.median(each.get("share", 0.0) for each in own)}
               for who, own in runs.items()}
    return {"work": work, "gradient_gap": gap, **medians}


def gradient_gap(folder: str) -> float:
    """Largest difference of a gradient, relative to the largest gradient."""
    from safetensors.torch import load_file
    ours, theirs = load_file(f"{folder}/ours"), load_file(f"{folder}/trl")
    if ours.keys() != theirs.keys():
        names = sorted(ours.keys() ^ theirs.keys())
        sys.exit(f"the gradients are of different parameters: {names[:3]}")
    largest = max(gradient.abs().max().item() for gradient in ours.values())
    gap = max((ours[name] - theirs[name]).abs().max().item() for name in ours) / largest
    if not gap < 1e-4:
        sys.exit(f"the gradients differ by {gap:.2g} of the largest: this is not the same work")
    return gap


def line_of(row: dict) -> str:
    ours, trl, gap = row["ours"], row["trl"], row["gradient_gap"]
    return (f"{row['work']['mode']:>5s} {row['work']['share']:>5.0%}"
            f"{ours['seconds']:10.3f}{trl['seconds']:9.3f}{trl['seconds'] / ours['seconds']:7.2f}"
            f"{ours['peak_gb']:10.2f}{trl['peak_gb']:9.2f}{trl['peak_gb'] / ours['peak_gb']:7.2f}"
            f"{f'{gap:.1e}' if gap is not None else '-':>13s}"
            f"{ours['tokens']:10.1f}{trl['tokens']:7.1f}"
            + (f"   matrix speed {ours['share']:.0%} {trl['share']:.0%}" if ours["share"] else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="toy")
    parser.add_argument("--data", default="divisor")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--work", nargs="+", default=["learn:1", "learn:.25", "step:.25"],
                        help="rows of the table, each with its share of answers with a weight")
    parser.add_argument("--mean-length", type=int,
                        help="sampling alone, with answers of many lengths")
    parser.add_argument("--rows", type=int,
                        help="answers in one micro-batch, for both (default: all of a step)")
    parser.add_argument("--gradient-checkpointing", action="store_true",
                        help="both run layers again in the backward pass")
    parser.add_argument("--rounds", type=int, default=5,
                        help="timed steps of each process (default 5)")
    parser.add_argument("--turns", type=int, default=2,
                        help="processes of each, in turn (default 2: A B A B)")
    parser.add_argument("--cpu-time", action="store_true",
                        help="seconds of the processor, which other jobs disturb less")
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl/bin/python",
                        help="TRL's environment (default .venv-trl)")
    parser.add_argument("--out", type=Path, default=Path("runs/against_trl.json"))
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        if args.child["cpu_time"]:
            time.perf_counter = time.process_time
        found = CHILDREN[args.child["who"], args.child["mode"]](args.child)
        print("\n" + json.dumps(found))
        return
    if not args.trl_python.is_file():
        sys.exit(f"against_trl.py: there is no {args.trl_python}; make test-integrations makes it")
    samples = args.prompts * args.n
    rows = args.rows or samples
    if samples % rows:
        sys.exit(f"against_trl.py: --rows is {rows}, but must divide the {samples} answers of a "
                 "step")
    pythons, table = {"ours": sys.executable, "trl": str(args.trl_python)}, []
    print(f"{args.model}: {args.prompts} prompts x {args.n} answers of at most "
          f"{args.max_new_tokens} tokens, micro-batches of {rows} answers\n")
    print(f"{'with a':>11s}{'seconds':>26s}{'peak GiB':>26s}{'gradients':>13s}{'tokens':>17s}")
    print(f"{'weight':>11s}{'ours':>10s}{'TRL':>9s}{'ratio':>7s}{'ours':>10s}{'TRL':>9s}"
          f"{'ratio':>7s}{'differ by':>13s}{'ours':>10s}{'TRL':>7s}")
    for each in ["sample:0"] if args.mean_length else args.work:
        mode, share = each.split(":")
        work = {"mode": mode, "share": float(share), "model": args.model, "data": args.data,
                "prompts": args.prompts, "n": args.n, "answer": args.max_new_tokens,
                "rows": rows, "rounds": args.rounds, "recompute": args.gradient_checkpointing,
                "mean": args.mean_length, "cpu_time": args.cpu_time}
        table.append(compare(work, pythons, args.turns))
        print(line_of(table[-1]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
