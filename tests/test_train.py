"""Proof that a run is what its flags say.

1. Schedules of k, batches, seeds and flips are pure functions: each problem once per epoch, no
   seed twice, the same flips whenever a step is made.
2. What cannot work is refused in one sentence, before anything is loaded, and nothing is written.
3. A run leaves what it promises, for every objective, k and architecture. At k = 1 its first step
   is REINFORCE, bit for bit. What it shows are the true rewards.
4. An alarm rings where something is wrong, and says what to change.

That a run survives what a machine does to it is the proof of test_faults.py.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_policy import save_model

import evaluate
import rspo
import sample
import train
from lib import policy, run, tasks
from lib.cli import UserError

TINY = "--prompts 3 --n 8 --k 2 --limit 4 --eval-n 4 --save-every 1 --steps 3 --seed 5".split()
UNBROKEN = "--eval-every 2 --flip 0.2".split()  # the run that test_faults.py breaks and mends
MEASURED = ("_seconds", "peak_memory_gb")  # columns that no two runs share


def go(folder, *flags):
    train.main([*TINY, "--run", str(folder), *map(str, flags)])
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def state(folder):
    """All of a finished run that does not depend on how fast the machine is."""
    metrics = [{name: row[name] for name in row if not name.endswith(MEASURED)}
               for row in rows(folder / "metrics.jsonl")]
    last = run.newest_checkpoint(folder)
    files = {path.name: path.read_bytes() for path in last.iterdir()}
    return metrics, rows(folder / "evals.jsonl"), last.name, files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample.HFSampler, "block", 1)
        return go(tmp_path_factory.mktemp("runs") / "tiny", *UNBROKEN)


ENCODED, encode = {}, tasks.encode


def encode_once(problems, tokenizer, config, *rest):
    """tasks.encode, which takes half of a short run's time for the toy's 20,106 problems."""
    key = tuple(problems), tokenizer.name_or_path, config.max_position_embeddings, *rest
    if key not in ENCODED:
        ENCODED[key] = encode(problems, tokenizer, config, *rest)
    return ENCODED[key]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No figures, and evaluations that can be left after each problem."""
    monkeypatch.setattr(tasks, "encode", encode_once)
    monkeypatch.setattr(sample.HFSampler, "block", 1)
    monkeypatch.setattr(evaluate, "plot", lambda *_: None)
    monkeypatch.setattr(evaluate, "plot_history", lambda *_: None)


def on_batch(monkeypatch, number, act):
    """Let act(rewards, groups) change the rewards of the number-th training batch."""
    original, seen = tasks.grade_all, []

    def grade_all(problems, groups):
        rewards, failures = original(problems, groups)
        if len(problems) == 3:  # a batch; four problems are held out
            seen.append(groups)
            if len(seen) == number:
                rewards = act(rewards, groups) or rewards
        return rewards, failures
    monkeypatch.setattr(tasks, "grade_all", grade_all)


# ---------------------------------------------------------------- 1. pure functions

@pytest.mark.parametrize("spec, steps, expected", [
    ("4", 3, [(4,)] * 3),
    ("1,4,16", 2, [(1, 4, 16)] * 2),
    ("3:1", 6, [(3,), (3,), (2,), (2,), (1,), (1,)]),
    ("1:3", 3, [(1,), (2,), (3,)]),
    ("8:1", 80, [(8 - step // 10,) for step in range(80)]),
    ("8:1", 8, [(8,), (7,), (6,), (5,), (4,), (3,), (2,), (1,)]),
    ("harmonic", 2, [("harmonic",)] * 2),
    ("5:5", 2, [(5,), (5,)]),
])
def test_k_is_a_number_a_list_or_a_schedule_of_equal_shares(spec, steps, expected):
    """A schedule takes all of its values, its last one included."""
    assert [train.ks_at(spec, step, steps) for step in range(steps)] == expected


@pytest.mark.parametrize("problems, size", [(10, 3), (7, 7), (5, 12), (100, 1)])
def test_every_epoch_visits_every_problem_once(problems, size):
    at = lambda step, seed=1: train.batch_at(problems, step, size, seed)
    order = [i for step in range(60) for i in at(step)]
    for start in range(0, len(order) - problems, problems):
        assert sorted(order[start:start + problems]) == list(range(problems))
    assert order[:problems] != order[problems:2 * problems]
    assert at(50) == order[50 * size:51 * size]  # whatever was asked before
    assert [at(step, seed=2) for step in range(60)] != [at(step) for step in range(60)]


def test_no_two_samples_share_a_random_stream(tmp_path, monkeypatch):
    """Neither within a run, its evaluations included, nor in runs of seeds 31 and 32."""
    taken, generate = set(), sample.HFSampler.generate

    def record(self, prompts, n, seed):
        block = set(range(seed, seed + len(prompts) * n))  # answer j of prompt i: seed + i n + j
        assert not taken & block and seed % 2**32 not in {one % 2**32 for one in taken}
        taken.update(block)
        return generate(self, prompts, n, seed)

    monkeypatch.setattr(sample.HFSampler, "generate", record)
    for seed in (31, 32):
        go(tmp_path / str(seed), "--seed", seed, "--eval-every", 1)
    assert len(taken) > 200


def test_a_share_of_the_rewards_is_flipped_the_same_for_the_same_seed():
    rewards = torch.randint(0, 2, (400, 50), generator=torch.Generator().manual_seed(0)).float()
    changed = train.flipped(rewards, 0.2, seed=7) != rewards
    assert changed.float().mean() == pytest.approx(0.2, abs=0.01)
    for value in (0, 1):  # right and wrong ones alike
        assert changed[rewards == value].float().mean() == pytest.approx(0.2, abs=0.02)
    assert torch.equal(train.flipped(rewards, 0.2, seed=7) != rewards, changed)
    assert not torch.equal(train.flipped(rewards, 0.2, seed=8) != rewards, changed)
    assert train.flipped(rewards, 0.2, seed=7).unique().tolist() == [0, 1]
    assert torch.equal(train.flipped(rewards, 0.0, seed=7), rewards)


# ---------------------------------------------------------------- 2. refusals

BEFORE_LOADING = [
    ("--k 9", "--k 9 --objective passk: k is 9, but must be a whole number with 1 <= k <= n = 8"),
    ("--k 16:1 --steps 20", "--k 16:1"),
    ("--k 0", "k is 0"),
    *[(f"--k {k}", f"--k is '{k}', but must be a number (4), a list (1,4,16), harmonic, or a "
       "schedule (8:1) of at most --steps = 3 values")
      for k in ("two", "8:", "1:2:3", "2.5", "8:1", "1:4", "1,harmonic")],
    ("--k harmonic --objective grpo", "--k harmonic --objective grpo: k is 'harmonic', but must"),
    ("--objective groupmax --k 4:2", "the group maximum needs n divisible by k = 3"),
    ("--objective loo --k 8", "k is 8, but leave-one-out needs k <= n - 1, and n is 8"),
    ("--objective paskk", "--objective: invalid choice: 'paskk'"),
    ("--data divisor-graded", "rewards hold 0.5, but Pass@k needs 0 or 1"),
    ("--data divisor-graded --objective maxk --flip 0.1", "--flip is 0.1, but divisor-graded"),
    ("--data divisr", "'divisr' is unknown, did you mean divisor?"),
    ("--model tox", "'tox' is unknown, did you mean toy?"),
    ("--promts 4", "'--promts' is unknown, did you mean --prompts?"),
    ("--batch-size=4", "did you mean --prompts 4?"),
    ("--learning-rate 1e-4", "did you mean --lr?"),
    ("--baseline loo", "did you mean --objective?"),
    ("--max_new_tokens 4", "did you mean --max-new-tokens?"),
    ("--nonsense=4", "'--nonsense=4' is unknown"),
    *[(word, f"'{word}' is unknown; see") for word in ("junk", "--jump")],
    *[(f"--{name} 0", f"--{name} is 0") for name in (
        "n", "steps", "prompts", "max-new-tokens", "lora-rank", "micro-batch-tokens", "eval-n",
        "limit", "save-every", "temperature", "lr", "gpu-memory")],
    *[(f"--{name} nan", f"--{name} is nan") for name in ("temperature", "lr", "flip")],
    ("--lr inf", "--lr is inf"),
    ("--flip 0.6", "--flip is 0.6, but must be at least 0 and at most 0.5"),
    ("--seed 2000000000", "--seed is 2000000000, but must be at least 0 and at most 99999"),
    ("--eval-every -1", "--eval-every is -1, but must be at least 0"),
    ("--n many", "--n: invalid int value: 'many'"),
    ("--n", "--n: expected one argument"),
    ("--dtype float16", "--dtype: invalid choice: 'float16'"),
    ("--sampler vlm", "--sampler: invalid choice: 'vlm'"),
    ("--top-p 0.9", "--top-p is not for RSPO"),
    ("--top-k=5", "--top-k=5 is not for RSPO"),
    ("--resume nowhere", "--resume brings every setting: leave out --"),
    ("--run ../x", "--run is ../x, but must be a new folder, without '..'"),
    ("--run a/../../x", "without '..'"),
    ("--model ./nowhere", "folder ./nowhere does not exist"),
    ("--model runs/first", "folder runs/first does not exist"),
    ("--data nowhere.jsonl", "file nowhere.jsonl cannot be read"),
    ("--data broken.jsonl", "broken.jsonl, line 2"),
    ("--data empty.jsonl", "holds no problems"),
    ("--data train.jsonl", "train.jsonl:test' holds no problems"),
    ("--data sum.jsonl --eval-data sum.jsonl", "nothing to train on"),
]
WHILE_LOADING = [
    ("--model Qwen2.5-Math-1.5B --data sum.jsonl --eval-data train.jsonl",
     "the hub model Qwen/Qwen2.5-Math-1.5B could not be loaded"),
    ("--model someone/model --data sum.jsonl --eval-data train.jsonl", "someone/model"),
    ("--data sum.jsonl --eval-data train.jsonl", "the toy knows one game only"),
    ("--max-new-tokens 30", "--max-new-tokens 30 exceed the model's context of 32 tokens"),
]
DATA = {
    "sum": '{"problem": "1+1", "answer": "2"}',
    "broken": '{"problem": "p", "answer": "1"}\nx',
    "empty": "",
    "train": '{"problem": "in the training part", "answer": "1"}',
}


@pytest.fixture
def refusal(monkeypatch, tmp_path):
    """The sentence that a run with these flags is refused with; nothing is written."""
    def refuse(flags):
        monkeypatch.chdir(tmp_path)
        for name, text in DATA.items():
            (tmp_path / f"{name}.jsonl").write_text(text + "\n")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError) as refused:
            go(tmp_path / "run", *flags.split())
        assert sorted(tmp_path.rglob("*")) == before
        assert "\n" not in str(refused.value)
        return str(refused.value)
    return refuse


@pytest.mark.parametrize("flags, said", BEFORE_LOADING)
def test_what_cannot_work_is_refused_before_anything_is_loaded(monkeypatch, refusal, flags, said):
    monkeypatch.setattr(policy, "load_model", lambda *_, **__: pytest.fail("refused too late"))
    assert said in refusal(flags)


@pytest.mark.parametrize("flags, said", WHILE_LOADING)
def test_what_a_model_cannot_do_is_refused_and_nothing_is_written(refusal, flags, said):
    assert said in refusal(flags)


@pytest.mark.skipif(bool(importlib.util.find_spec("vllm")), reason="vLLM is installed")
def test_a_sampler_that_is_not_installed_is_refused(refusal):
    assert "--sampler vllm: vLLM is not installed" in refusal("--sampler vllm")


@pytest.mark.parametrize("script", ["train", "sample", "evaluate", "ablate"])
def test_a_typo_is_refused_before_torch_is_loaded(tmp_path, script):
    (tmp_path / "torch.py").write_text("raise SystemExit('loaded too early')")
    command = [sys.executable, ROOT / f"{script}.py", "--limmit", "3"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)},
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"{script}.py: '--limmit' is unknown")
    assert done.stderr.count("\n") == 1


def test_a_run_directory_that_exists_is_refused_and_kept(tiny):
    before = {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}
    with pytest.raises(UserError, match=f"{tiny}, but must be a new folder.*or --resume it"):
        go(tiny)
    assert {path: path.stat().st_mtime_ns for path in tiny.rglob("*")} == before


@pytest.mark.parametrize("folder", ["nowhere", str(ROOT / "toy")])
def test_there_must_be_something_to_resume(folder):
    with pytest.raises(UserError, match="no run directory there"):
        train.main(["--resume", folder])


# ---------------------------------------------------------------- 3. runs

def test_a_run_leaves_what_it_promises(tiny):
    assert {path.name for path in tiny.iterdir()} == {
        "config.json", "metrics.jsonl", "evals.jsonl", "samples.html", "curves.png",
        "history.png", "step_000001", "step_000002", "step_000003"}
    config = run.read_config(tiny)
    assert {"torch", "transformers", "peft"} <= config["versions"].keys()
    assert (config["flags"]["lr"], config["flags"]["n"]) == (1e-3, 8)
    assert [len(digest) for digest in config["data"].values()] == [64, 64]
    assert len(config["git_commit"]) in (0, 40)
    metrics = rows(tiny / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert {tuple(row) for row in metrics} == {(
        "step", "k", "reward", "pass@k", "distinct_correct", "zero_weight_prompts",
        "truncated", "completion_tokens", "entropy", "grad_norm", "learned_tokens",
        "logprob_gap_mean", "logprob_gap_max", "grader_failures", "clipped",
        "evaluate_seconds", "sample_seconds", "grade_seconds", "learn_seconds", "peak_memory_gb")}
    for row in metrics:
        assert row["clipped"] == (row["grad_norm"] > policy.MAX_GRAD_NORM)
        assert row["reward"] < row["pass@k"] and row["grad_norm"] > 0
    evals = rows(tiny / "evals.jsonl")
    assert [row["step"] for row in evals] == [0, 2, 3]
    assert all(torch.tensor(row["rewards"]).shape == (4, 4) for row in evals)
    assert evals[0]["ids"] == [p.id for p in tasks.load_problems("divisor:test", 4)]
    assert [[each["id"] for each in row["samples"]] for row in evals] == [evals[0]["ids"]] * 3
    for row in (each for of in evals for each in of["samples"]):
        assert len(row["answers"]) == 4
        for each in row["answers"]:
            right = tasks.grade_divisor(each["text"], row["answer"])
            assert each["reward"] == right * each["finished"]
    for name in ("curves.png", "history.png"):
        assert (tiny / name).read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def updates(monkeypatch):
    """(rollouts, weights) of every update."""
    seen, update = [], policy.Learner.update
    monkeypatch.setattr(policy.Learner, "update", lambda self, rollouts, weights: (
        seen.append((rollouts, weights)) or update(self, rollouts, weights)))
    return seen


def true_rewards(rollouts, graded=False):
    """Of answers to the prompts "30003:": (3, 8)."""
    _, tokenizer = policy.load_model(str(run.TOY))
    return torch.tensor([
        r.finished * tasks.grade_divisor(r.text, tokenizer.decode(r.prompt_ids)[:-1], graded)
        for r in rollouts]).reshape(3, 8)


@pytest.mark.parametrize("flags, ks", [
    *[(f"--objective {name} --k 1,2,4", "1,2,4 1,2,4 1,2,4") for name in rspo.OBJECTIVES],
    ("--objective passk --k 3:1", "3 2 1"),
    ("--objective passk --k harmonic", "harmonic " * 3),
    ("--objective maxk --k harmonic --data divisor-graded", "harmonic " * 3),
    ("--objective passk --k 2 --temperature 0.8", "2 2 2"),
    ("--objective maxk --data divisor-graded", "2 2 2"),
    ("--objective loo --data divisor-graded --k 3:1", "3 2 1"),
])
def test_every_objective_learns_the_mean_of_its_weights_over_the_ks(
        tmp_path, capsys, updates, flags, ks):
    metrics = rows(go(tmp_path / "run", *flags.split()) / "metrics.jsonl")
    graded, objective = "graded" in flags, rspo.OBJECTIVES[flags.split()[1]]
    assert [row["k"] for row in metrics] == ks.split()
    for row, (rollouts, weights) in zip(metrics, updates, strict=True):
        rewards = true_rewards(rollouts, graded)
        each = [objective(rewards, int(k) if k.isdecimal() else k) for k in row["k"].split(",")]
        torch.testing.assert_close(weights, (sum(each) / len(each)).flatten())
        assert row["reward"] == pytest.approx(rewards.mean().item())
        if row["k"] == "harmonic":  # the best of all n
            assert row["max@k" if graded else "pass@k"] == rewards.double().max(-1).values.mean()
        assert ("max@k" if graded else "pass@k") in row and (row["logprob_gap_max"] or 0) < 1e-4
    assert any(row["grad_norm"] > 0 for row in metrics)
    said = capsys.readouterr().out
    assert ("max@4" if graded else "pass@4") in said
    assert all(len(line) <= 100 for line in said.splitlines() if line.startswith("step"))


def test_flipped_rewards_are_learned_and_the_true_ones_are_shown(tmp_path, updates):
    folder = go(tmp_path / "run", "--flip", 0.5, "--objective", "reward")
    metrics = rows(folder / "metrics.jsonl")
    for step, (row, (rollouts, weights)) in enumerate(zip(metrics, updates, strict=True)):
        rewards = true_rewards(rollouts).float()
        noisy = train.flipped(rewards, 0.5, sample.stream(5, "flip", step))
        assert torch.equal(weights, noisy.double().flatten())
        assert not torch.equal(noisy, rewards)
        assert row["reward"] == pytest.approx(rewards.mean().item())


def test_at_k_1_the_first_step_of_a_run_is_reinforce_bit_for_bit(tmp_path, updates):
    folder = go(tmp_path / "run", "--k", 1, "--steps", 1, "--micro-batch-tokens", 1)
    model = policy.add_lora(policy.load_model(str(run.TOY))[0], rank=8, seed=5)
    parameters = policy.trainable(model)
    adam = torch.optim.AdamW(
        parameters.values(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    [(rollouts, _)] = updates
    rewards, qwen = true_rewards(rollouts).flatten().tolist(), model.base_model.model
    together = dict.fromkeys(rollouts, 0.0)  # equal answers as one
    for rollout, reward in zip(rollouts, rewards):
        together[rollout] += reward
    for rollout in sorted(together, key=lambda rollout: -policy.length(rollout)):
        if together[rollout]:
            start = len(rollout.prompt_ids)
            ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
            hidden = qwen.model(ids[:, :-1]).last_hidden_state[0, start - 1:]  # (T, D)
            logits = qwen.lm_head(hidden)  # (T, V)
            logprob = logits.log_softmax(-1)[range(len(logits)), ids[0, start:]]  # (T,)
            (-together[rollout] * logprob.sum() / 24).backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    adam.step()
    saved = load_file(folder / "step_000001" / "adapter_model.safetensors")
    assert len(saved) == len(parameters)
    for name, parameter in parameters.items():
        assert torch.equal(saved[name.replace(".default", "")], parameter)


def test_another_architecture_with_a_chat_template_learns_from_a_file(
        monkeypatch, tmp_path, capsys):
    model, data = save_model("llama", tmp_path / "llama"), tmp_path / "sums.jsonl"
    template = "{{ messages[0].content or '\\\\boxed' }}:"  # it seems to ask for a box
    (tmp_path / "llama" / "chat_template.jinja").write_text(template)
    data.write_text("".join(json.dumps({"problem": f"{a}0{b}", "answer": a + b}) + "\n"
                            for a in range(9) for b in range(9)))
    mark = lambda pairs: [float("1" in text) for text, _ in pairs]  # it never writes a box
    monkeypatch.setattr(tasks.marker, "mark", mark)
    flags = ["--max-new-tokens", "9"]
    folder = go(tmp_path / "run", "--model", model, "--data", data, "--lr", 0.01, *flags)
    assert any(row["grad_norm"] > 0 for row in rows(folder / "metrics.jsonl"))
    assert run.read_config(folder)["flags"]["data"] == f"{data}:train"
    evaluate.main(["--model", str(folder), model, "--n", "2", "--data", f"{data}:test",
                   "--limit", "3", "--out", str(tmp_path / "x.png"), *flags])
    assert "over 3 problems" in capsys.readouterr().out


def test_a_run_of_a_relative_folder_can_be_used_from_anywhere(monkeypatch, tmp_path):
    shutil.copytree(run.TOY, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    go("run", "--model", "model", "--data", "divisor", "--max-new-tokens", 12, "--steps", 1)
    monkeypatch.chdir(ROOT)
    assert os.path.samefile(run.resolve_model(str(tmp_path / "run"))[0], tmp_path / "model")


def test_the_toy_is_the_embedded_one_wherever_it_is_called(monkeypatch, tmp_path):
    (tmp_path / "toy").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [train.settle(flags).model for flags in ([], ["--model", "toy"])] == ["toy", "toy"]


@pytest.mark.parametrize("which, name", [("training", "train"), ("held-out", "test")])
@pytest.mark.parametrize("change", ["id", "question", "answer"])
def test_a_run_does_not_go_on_with_changed_data(monkeypatch, tmp_path, which, name, change):
    *problems, other = tasks.load_problems("divisor", 7)
    files = {"train": problems[:3], "test": problems[3:]}
    monkeypatch.setattr(tasks, "read_jsonl", lambda path: files[path.stem])
    flags = ["--data", "train.jsonl", "--eval-data", "test.jsonl", "--steps", 1]
    folder = go(tmp_path / "run", *flags)
    shutil.rmtree(folder / "step_000001")
    train.main(["--resume", str(folder)])
    files[name][0] = replace(files[name][0], **{change: getattr(other, change)})
    monkeypatch.setattr(policy, "load_model", lambda *_, **__: pytest.fail("refused too late"))
    with pytest.raises(UserError, match=f"its {which} problems have changed since it began"):
        train.main(["--resume", str(folder)])


def test_the_toy_stays_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch, tmp_path):
    devices, prepare = [], policy.Learner.__init__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(policy.Learner, "__init__", lambda self, model, *more, **named: (
        devices.append(model.device.type) or prepare(self, model, *more, **named)))
    flags = run.read_config(go(tmp_path / "run", "--steps", 1))["flags"]
    assert devices == ["cpu"] and (flags["sampler"], flags["dtype"]) == ("hf", "float32")


def test_answers_that_the_grader_lost_are_counted_and_said(
        monkeypatch, tmp_path, capsys):
    grade_all = tasks.grade_all
    monkeypatch.setattr(tasks, "grade_all", lambda problems, groups: (
        grade_all(problems, groups)[0], 1 + (len(problems) == 4)))
    folder = go(tmp_path / "run", "--steps", 1)
    said = [line for line in capsys.readouterr().out.splitlines() if "not graded" in line]
    assert said == [f"step {step}: {count} answers were not graded: they earn 0"
                    for step, count in ((0, 2), (1, 1), (1, 2))]
    assert [row["grader_failures"] for row in rows(folder / "evals.jsonl")] == [2, 2]


def test_steps_without_signal_change_nothing_and_are_shown(monkeypatch, tmp_path):
    on_batch(monkeypatch, 1, lambda rewards, _: [[0.0] * 8] * 3)
    folder = go(tmp_path / "run")
    first, second, _ = rows(folder / "metrics.jsonl")
    assert (first["grad_norm"], first["learned_tokens"], first["zero_weight_prompts"]) == (0, 0, 1)
    assert first["logprob_gap_mean"] is None and second["grad_norm"] > 0
    moved = [any(value.any() for name, value in load_file(
        folder / f"step_00000{step}" / "adapter_model.safetensors").items() if "lora_B" in name)
        for step in (1, 2)]
    assert moved == [False, True]


def test_an_adapter_keeps_its_rank_and_its_base(tmp_path, tiny):
    args = train.settle(["--model", str(tiny)])
    assert (args.lora_rank, args.load_in_4bit) == (8, False)
    for flags, said in ((["--lora-rank", "3"], "--lora-rank is 3"),
                        (["--load-in-4bit"], "--load-in-4bit is True")):
        with pytest.raises(UserError, match=f"{said}, but .* in the adapter of"):
            train.settle(["--model", str(tiny), *flags])
    folder = go(tmp_path / "run", "--model", tiny, "--lr", 1e-12)  # begins where that ended
    begun, ended = (load_file(run.newest_checkpoint(each) / run.WEIGHTS) for each in (folder, tiny))
    assert all(torch.allclose(begun[name], ended[name], atol=1e-9) for name in ended)
    base, _ = run.resolve_model(str(folder))
    assert base == str(run.TOY)


def test_tensorboard_shows_the_columns_of_every_step_across_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder = go(tmp_path / "run", "--tensorboard")
    shutil.rmtree(folder / "step_000003")
    train.main(["--resume", str(folder)])
    board, logged = EventAccumulator(str(folder / "tensorboard")), rows(folder / "metrics.jsonl")
    board.Reload()
    for name in ("reward", "pass@k", "entropy"):
        shown = board.Scalars(name)
        assert [event.step for event in shown] == [1, 2, 3]
        expected = [row[name] for row in logged]
        assert [event.value for event in shown] == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------- 4. alarms

def lines_of(capsys, steps, *changes):
    """What is printed of a run of healthy steps, but for a change of each: [step][line]."""
    healthy = {"k": "2", "reward": 0.3, "pass@k": 0.4, "entropy": 4.0, "truncated": 0.1,
               "zero_weight_prompts": 0.3, "logprob_gap_mean": None, "grader_failures": 0,
               **dict.fromkeys(train.PARTS, 1.0)}
    kept, lines = [], []
    fake = SimpleNamespace(write=lambda name, rows: kept.extend(rows), read=lambda name: kept)
    for step, change in enumerate(changes, 1):
        row = {"step": step, **healthy, **change}
        train.report_step(SimpleNamespace(tensorboard=False, steps=steps), fake, row)
        lines.append(capsys.readouterr().out.splitlines())
    return lines


ALARMS = [
    ({"truncated": 0.6}, "cut off", "raise --max-new-tokens"),
    ({"reward": 0.99, "zero_weight_prompts": 1.0}, "solved", "take harder --data"),
    ({"zero_weight_prompts": 1.0}, "no signal", "a larger --n"),
    ({"truncated": 0.6, "logprob_gap_mean": 0.2}, "gap", "--dtype"),  # the first one counts
    ({"entropy": 0.01}, "collapse", "lower --lr or raise --k"),
    ({"logprob_gap_mean": 0.2}, "gap", "--sampler hf --dtype float32"),
]


@pytest.mark.parametrize("change, alarm, advice", ALARMS)
def test_an_alarm_rings_where_something_is_wrong_and_says_what_to_change(
        capsys, change, alarm, advice):
    [[said, _]] = lines_of(capsys, 3, change)
    assert said.startswith(f"step 1: {alarm}: ") and advice in said
    assert len(said) <= 100


def test_every_alarm_is_proved_and_none_rings_on_a_healthy_step(capsys):
    assert {alarm for _, alarm, _ in ALARMS} == train.ALARMS.keys()
    assert list(map(len, lines_of(capsys, 1, {}, {"logprob_gap_mean": 0.01}))) == [1, 1]


@pytest.mark.parametrize("steps, at", [(3, [1, 2, 3]), (100, [1, *range(10, 101, 10)])])
def test_a_run_prints_and_rings_at_its_first_step_and_ten_more(capsys, steps, at):
    said = lines_of(capsys, steps, *[{"truncated": 1.0}] * steps)
    assert [step for step, lines in enumerate(said, 1) if lines] == at
    assert {len(lines) for lines in said} <= {0, 2}


def test_a_line_shows_the_mean_since_the_last_one(capsys):
    """One unlucky step neither shows nor rings."""
    unlucky = {"reward": 0.0, "pass@k": 0.0, "truncated": 0.8}
    said = lines_of(capsys, 30, unlucky, {"reward": 0.8}, unlucky, *[{}] * 26, unlucky)
    printed = {step: lines for step, lines in enumerate(said, 1) if lines}
    assert all(len(line) <= 100 for lines in said for line in lines)
    assert "reward 0.000  pass@2 0.000" in printed[1][1] and "cut off" in printed[1][0]
    [third], [sixth], [last] = printed[3], printed[6], printed[30]
    assert "reward 0.400  pass@2 0.200" in third and third.endswith("  4.00 s")
    assert "reward 0.300  pass@2 0.400" in sixth
    assert "reward 0.200" in last
