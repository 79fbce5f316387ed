"""The same work through TRL 1.16's GRPOTrainer and through train.py: learning time, whole step, peak memory.

    make test-integrations                                        makes .venv-trl, TRL's own environment
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/against_trl.py                                                        the toy
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/against_trl.py --model runs/smollm2 --data runs/sums.jsonl --prompts 4 --max-new-tokens 64

Same model, prompts, n, lengths, LoRA, AdamW, micro-batch, number format and threads, in turn, A B A B, each time in a process of its own.
Learning: one update on given answers of exactly --max-new-tokens random tokens, of which a share has a weight that is not 0;
the gradients of the two are compared. Whole step: sample, grade, learn and sync with rewards drawn at random (a quarter right, in
place of the grader's verdict, which is timed all the same). TRL runs integrations/trl_rspo.py. Medians without each process's first
step; peak memory is what a process held at most beyond what it held before loading the model. Writes --out as JSON.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LR, RANK, ALPHA = 1e-4, 8, 32


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


# ---------------------------------------------------------------- what both do alike

def start_model(work: dict):
    """(model with an adapter whose B is not 0, tokenizer, problems, prompts): the same in both environments."""
    import torch

    import policy
    import sample
    import tasks
    model, tokenizer = policy.load_model(work["model"], "float32", "cpu")
    problems = tasks.load_problems(work["data"])
    prompts = sample.encode_prompts(problems, tokenizer, sample.context_length(model.config), work["answer"])
    model = policy.add_lora(model, RANK, ALPHA, seed=0)
    if work["recompute"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(1)
    for parameter in policy.trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.02)
    return model, tokenizer, problems, prompts


def given_answers(work: dict, prompts, vocabulary: int) -> tuple[list, list[float]]:
    """P * n rollouts of random tokens and their rewards, of which the first of each group are 1."""
    import sample
    draw, rows, rewards = random.Random(0), [], []
    for prompt in prompts[:work["prompts"]]:
        for i in range(work["n"]):
            ids = tuple(draw.randrange(2, vocabulary) for _ in range(work["answer"]))
            rows.append(sample.Rollout(prompt, ids, (0.0,) * len(ids), "", False))
            rewards.append(float(i < round(work["share"] * work["n"])))
    return rows, rewards


def draw_rewards(share: float) -> None:
    """From now on the grader's verdicts, taken as always, are replaced by drawn ones."""
    import tasks
    real, draw = tasks.grade_all, random.Random(0)
    tasks.grade_all = lambda problems, groups: [[float(draw.random() < share) for _ in row] for row in real(problems, groups)]


def save_gradients(path: str, parameters: dict) -> None:
    from safetensors.torch import save_file
    save_file({name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}, path)


# ---------------------------------------------------------------- ours

def learn_ours(work: dict) -> dict:
    import torch

    import policy
    import train
    before = peak_gb()
    model, tokenizer, _, prompts = start_model(work)
    rows, rewards = given_answers(work, prompts, min(len(tokenizer), model.config.vocab_size))
    optimizer, taken = policy.make_optimizer(model, LR, eight_bit=False), []
    for i in range(work["rounds"] + 1):
        begin = time.perf_counter()
        weights = train.weigh(torch.tensor(rewards).reshape(-1, work["n"]), (1,), "passk", "none").flatten()
        policy.update(model, optimizer, rows, weights, num_samples=len(rows), temperature=1.0, max_grad_norm=float("inf"),
                      micro_batch_tokens=work["rows"] * max(len(row.prompt_ids) + len(row.completion_ids) for row in rows))
        taken.append(time.perf_counter() - begin)
        if i == 0:
            save_gradients(work["gradients"], policy.trainable(model))
    return {"seconds": taken[1:], "peak_gb": peak_gb() - before}


def step_ours(work: dict) -> dict:
    import policy
    import sample
    import tasks
    import train
    draw_rewards(work["share"])
    before = peak_gb()
    tokenizer = policy.load_tokenizer(policy.resolve_model(work["model"])[0])
    longest = max(map(len, sample.encode_prompts(tasks.load_problems(work["data"]), tokenizer, 10**9, work["answer"])))
    with tempfile.TemporaryDirectory() as folder:
        flags = {"model": work["model"], "data": work["data"], "prompts": work["prompts"], "n": work["n"], "max-new-tokens": work["answer"], "k": 4,
                 "dtype": "float32", "sampler": "hf", "lora-rank": RANK, "lora-alpha": ALPHA, "lr": LR, "steps": work["rounds"] + 1, "limit": 1,
                 "eval-n": 2, "save-every": 1000, "micro-batch-tokens": work["rows"] * (longest + work["answer"]), "run": f"{folder}/run"}
        train.main([word for name, value in flags.items() for word in (f"--{name}", str(value))]
                   + ["--gradient-checkpointing" if work["recompute"] else "--no-gradient-checkpointing"])
        rows = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()][1:]
    return {"seconds": [row["seconds"] for row in rows], "peak_gb": peak_gb() - before, "tokens": statistics.mean(row["completion_tokens"] for row in rows)}


# ---------------------------------------------------------------- TRL's

def trl_trainer(work: dict, model, tokenizer, rows: list[dict], reward, k: int, **others):
    import datasets
    from transformers import TrainerCallback

    from integrations.trl_rspo import GRPOConfig, RSPOTrainer

    class Timed(RSPOTrainer):
        prepared = 0.0

        def _prepare_inputs(self, batch):                       # sampling and grading; on later micro-batches nothing
            begin = time.perf_counter()
            batch = super()._prepare_inputs(batch)
            self.prepared += time.perf_counter() - begin
            return batch

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **unused):
            trainer.prepared, self.begin = 0.0, time.perf_counter()

        def on_pre_optimizer_step(self, args, state, control, model, **unused):
            if state.global_step == 0 and work["mode"] == "learn":
                save_gradients(work["gradients"], {name: p for name, p in model.named_parameters() if p.requires_grad})

        def on_step_end(self, args, state, control, **unused):
            steps.append({"whole": time.perf_counter() - self.begin, "prepared": trainer.prepared})

    steps: list[dict] = []
    samples = work["prompts"] * work["n"]
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, num_generations=work["n"], per_device_train_batch_size=work["rows"], max_steps=work["rounds"] + 1,
            gradient_accumulation_steps=samples // work["rows"], max_completion_length=work["answer"], learning_rate=LR, lr_scheduler_type="constant",
            adam_beta2=0.95, max_grad_norm=0.0 if work["mode"] == "learn" else 1.0, loss_type="luspo", scale_rewards="none", use_cpu=True, bf16=False,
            gradient_checkpointing=work["recompute"], gradient_checkpointing_kwargs={"use_reentrant": False}, report_to="none", save_strategy="no", logging_steps=10**6, disable_tqdm=True, shuffle_dataset=False, seed=0)
        trainer = Timed(model, reward, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Watch()], k=k, **others)
        trainer.train()
    return steps


def learn_trl(work: dict) -> dict:
    import integrations.trl_rspo  # noqa: F401  (what is imported is not counted as memory)
    before = peak_gb()
    model, tokenizer, _, prompts = start_model(work)
    made, rewards = given_answers(work, prompts, min(len(tokenizer), model.config.vocab_size))
    given = lambda prompts, trainer: {"prompt_ids": [list(r.prompt_ids) for r in made], "completion_ids": [list(r.completion_ids) for r in made],
                                      "logprobs": None}
    steps = trl_trainer(work, model, tokenizer, [{"prompt": "-"}] * work["prompts"], lambda **unused: rewards, 1, rollout_func=given)
    return {"seconds": [step["whole"] - step["prepared"] for step in steps[1:]], "peak_gb": peak_gb() - before}


def step_trl(work: dict) -> dict:
    import integrations.trl_rspo  # noqa: F401
    import sample
    import tasks
    draw_rewards(work["share"])
    before = peak_gb()
    model, tokenizer, problems, _ = start_model(work)
    stops = model.generation_config.eos_token_id = sample.stop_ids(model.generation_config, tokenizer)
    lengths: list[int] = []

    def reward(completions, completion_ids, problem, **unused):
        lengths.extend(map(len, completion_ids))
        answers = [[(text, ids[-1] in stops)] for text, ids in zip(completions, completion_ids)]
        return [grade for [grade] in tasks.grade_all([problems[i] for i in problem], answers)]

    rows = [{"prompt": tasks.render(problem, tokenizer), "problem": i} for i, problem in enumerate(problems)]
    steps = trl_trainer(work, model, tokenizer, rows, reward, 4)
    return {"seconds": [step["whole"] for step in steps[1:]], "peak_gb": peak_gb() - before, "tokens": statistics.mean(lengths)}


CHILDREN = {("ours", "learn"): learn_ours, ("ours", "step"): step_ours, ("trl", "learn"): learn_trl, ("trl", "step"): step_trl}


# ---------------------------------------------------------------- side by side

def child(python: str, who: str, work: dict) -> dict:
    command = [python, __file__, "--child", json.dumps({"who": who, **work})]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})           # both on the CPU, where there is a GPU too
    if done.returncode:
        sys.exit(f"{who}, {work['mode']} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(work: dict, pythons: dict, turns: int) -> dict:
    """Medians of each, ratios TRL / ours, and in learning the largest difference of a gradient relative to the largest gradient."""
    results = {who: [] for who in pythons}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(turns):
            for who, python in pythons.items():
                results[who].append(child(python, who, {**work, "gradients": f"{folder}/{who}"}))
        row = {"work": work, **{who: {"seconds": statistics.median(value for run in runs for value in run["seconds"]),
                                      "peak_gb": statistics.median(run["peak_gb"] for run in runs),
                                      "tokens": runs[0].get("tokens", work["answer"])} for who, runs in results.items()}}
        if work["mode"] == "learn":
            from safetensors.torch import load_file
            ours, theirs = load_file(f"{folder}/ours"), load_file(f"{folder}/trl")
            if ours.keys() != theirs.keys():
                sys.exit(f"the gradients are of different parameters: {sorted(ours.keys() ^ theirs.keys())[:3]}")
            row["gradient_gap"] = max((ours[name] - theirs[name]).abs().max().item() for name in ours) / max(g.abs().max().item() for g in ours.values())
            if not row["gradient_gap"] < 1e-4:
                sys.exit(f"the gradients differ by {row['gradient_gap']:.2g} of the largest: this is not the same work")
    return row | {"time_ratio": row["trl"]["seconds"] / row["ours"]["seconds"], "memory_ratio": row["trl"]["peak_gb"] / row["ours"]["peak_gb"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="toy")
    parser.add_argument("--data", default="countdown")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--rows", type=int, help="answers in one forward and backward, for both (default: all of a step)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="both run layers again in the backward pass, as both do by default")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each process (default 5)")
    parser.add_argument("--turns", type=int, default=2, help="processes of each, in turn (default 2: A B A B)")
    parser.add_argument("--trl-python", type=Path, default=ROOT / ".venv-trl/bin/python", help="TRL's environment (default .venv-trl)")
    parser.add_argument("--out", type=Path, default=Path("runs/against_trl.json"))
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("\n" + json.dumps(CHILDREN[args.child["who"], args.child["mode"]](args.child)))
        return
    if not args.trl_python.is_file():
        sys.exit(f"against_trl.py: there is no {args.trl_python}; make test-integrations makes .venv-trl")
    rows = args.rows or args.prompts * args.n
    if args.prompts * args.n % rows:
        sys.exit(f"against_trl.py: --rows is {rows}, but must divide the {args.prompts * args.n} answers of a step")
    pythons = {"ours": sys.executable, "trl": str(args.trl_python)}
    table = []
    print(f"{args.model}: {args.prompts} prompts x {args.n} answers of at most {args.max_new_tokens} tokens, micro-batches of {rows} answers")
    print("work                       seconds: ours      TRL   TRL / ours    peak GiB: ours     TRL   TRL / ours   gradients differ by   tokens")
    for mode, share in (("learn", 1.0), ("learn", 0.25), ("step", 0.25)):
        work = {"mode": mode, "share": share, "model": args.model, "data": args.data, "prompts": args.prompts, "n": args.n, "answer": args.max_new_tokens,
                "rows": rows, "rounds": args.rounds, "recompute": args.gradient_checkpointing}
        table.append(row := compare(work, pythons, args.turns))
        gap = f"{row['gradient_gap']:.1e}" if mode == "learn" else "-"
        print(f"{mode}, {share:4.0%} with a weight {row['ours']['seconds']:14.3f} {row['trl']['seconds']:8.3f} {row['time_ratio']:12.2f} "
              f"{row['ours']['peak_gb']:17.2f} {row['trl']['peak_gb']:7.2f} {row['memory_ratio']:12.2f} {gap:>21s}   "
              f"{row['ours']['tokens']:.1f}, {row['trl']['tokens']:.1f}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
