"""Proof that a run is what its flags say, and that nothing stops it from going on exactly where it was.

1. Schedules of k, batches and seeds are pure functions: every problem once an epoch, no seed twice.
2. What cannot work is refused at start in one sentence with the numbers, and nothing is written.
3. A run leaves the files it promises, with the same columns in every row, for every objective, k and architecture.
4. Killed (really, by SIGKILL), interrupted or stopped by bad numbers, it resumes to the same metrics rows, the same
   evaluations and the same adapter, bit for bit.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import evaluate
import policy
import rspo
import sample
import tasks
import train
from conftest import ROOT
from tasks import UserError
from test_policy import save_model

TINY = "--prompts 3 --n 8 --k 2 --limit 4 --eval-n 4 --save-every 1 --steps 3 --seed 5".split()
KILLED = "--prompts 4 --n 8 --k 2 --limit 4 --eval-n 4 --save-every 2 --steps 40 --eval-every 16 --seed 5".split()
MEASURED = ("_per_s", "seconds", "peak_memory_gb")              # columns that no two runs share


def go(run, *flags):
    train.main([*TINY, "--run", str(run), *map(str, flags)])
    return run


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def state(run):
    """Everything of a finished run that does not depend on how fast the machine is."""
    metrics = [{name: value for name, value in row.items() if not name.endswith(MEASURED)} for row in rows(run / "metrics.jsonl")]
    last = policy.newest_checkpoint(run)
    return (metrics, rows(run / "evals.jsonl"), rows(run / "samples.jsonl"), last.name,
            *((last / name).read_bytes() for name in ("adapter_model.safetensors", "optimizer.safetensors", "state.json")))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return go(tmp_path_factory.mktemp("runs") / "tiny", "--eval-every", 2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No figures, and the signal handlers of pytest afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(evaluate, "plot", lambda *_: None)
    monkeypatch.setattr(evaluate, "plot_history", lambda *_: None)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def on_batch(monkeypatch, number, act):
    """Have the number-th training batch graded by act(rewards) -> rewards."""
    original, seen = tasks.grade_all, []

    def grade_all(problems, groups):
        rewards = original(problems, groups)
        seen.extend([1] if len(problems) == 3 else [])
        return act(rewards) if len(problems) == 3 and len(seen) == number else rewards
    monkeypatch.setattr(tasks, "grade_all", grade_all)


# ---------------------------------------------------------------- 1. pure functions

@pytest.mark.parametrize("spec, steps, expected", [
    ("4", 3, [(4,)] * 3), ("1,4,16", 2, [(1, 4, 16)] * 2), ("3:1", 6, [(3,), (3,), (2,), (2,), (1,), (1,)]), ("1:3", 3, [(1,), (2,), (3,)]),
    ("8:1", 80, [(8 - step // 10,) for step in range(80)]), ("8:1", 2, [(8,), (4,)]), ("5:5", 2, [(5,), (5,)])])
def test_k_is_a_number_a_list_or_a_schedule_of_equal_shares(spec, steps, expected):
    assert [train.ks_at(spec, step, steps) for step in range(steps)] == expected


@pytest.mark.parametrize("problems, size", [(10, 3), (7, 7), (5, 12), (100, 1)])
def test_every_epoch_visits_every_problem_once(problems, size):
    order = [i for step in range(60) for i in train.batch_at(problems, step, size, seed=1)]
    assert all(sorted(order[e:e + problems]) == list(range(problems)) for e in range(0, len(order) - problems, problems))
    assert train.batch_at(problems, 50, size, seed=1) == order[50 * size:51 * size]     # whatever was asked before
    assert train.batch_at(problems, 50, size, seed=2) != order[50 * size:51 * size] or size == problems == 1
    assert order[:problems] != order[problems:2 * problems]


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_no_two_samples_of_a_run_share_a_seed(seed):
    starts = [train.seed_at(seed, step, 512) for step in range(1000)] + [seed + 10**15]
    blocks = sorted((start, start + 512) for start in starts)
    assert all(end <= start for (_, end), (start, _) in zip(blocks, blocks[1:]))


@pytest.mark.parametrize("objective, baseline, weights", [
    ("passk", "none", rspo.pass_at_k_weights), ("maxk", "none", rspo.max_at_k_weights), ("groupmax", "none", rspo.group_max_weights),
    ("passk", "loo", rspo.leave_one_out_weights), ("maxk", "loo", rspo.leave_one_out_weights)])
def test_a_list_of_k_is_the_mean_of_the_objectives(objective, baseline, weights):
    rewards = torch.tensor([[1., 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0]])
    assert torch.equal(train.weigh(rewards, (1, 2, 4), objective, baseline), sum(weights(rewards, k) for k in (1, 2, 4)) / 3)


@pytest.mark.parametrize("change, alarm", [({}, []), ({"truncated": 0.6}, ["truncated"]), ({"zero_weight_prompts": 0.99}, ["zero"]),
                                           ({"logprob_gap_mean": 0.2}, ["gap"]), ({"entropy": 0.01}, ["entropy"]), ({"logprob_gap_mean": None}, [])])
def test_tripwires(tiny, change, alarm):
    row = {**rows(tiny / "metrics.jsonl")[0], "zero_weight_prompts": 0.5, **change}
    assert list(train.tripwires(row)) == alarm


# ---------------------------------------------------------------- 2. refusals

@pytest.mark.parametrize("flags, said", [
    ("--k 9", "--k is 9, but every k must lie in 1..n, and --n is 8"), ("--k 1,16", "1,16"), ("--k 16:1 --steps 20", "16:1"), ("--k 0", "--k is 0"),
    ("--k two", "--k is 'two', but must be a number"), ("--k 8:", "--k is '8:'"), ("--k 1:2:3", "'1:2:3'"), ("--k 2.5", "'2.5'"),
    ("--objective groupmax --k 3", "--n is 8 and k is 3"), ("--objective groupmax --k 4:2 --steps 9", "k is 3"),
    ("--objective groupmax --baseline loo", "leave --baseline out"), ("--baseline loo --k 8", "--n is 8 and k is 8"),
    ("--objective paskk", "'paskk' is unknown, did you mean 'passk'"), ("--baseline lo", "--baseline"),
    ("--data countdown-graded", "--objective passk needs 0/1 rewards"), ("--data countdwn", "did you mean 'countdown'"), ("--model tox", "did you mean 'toy'"),
    ("--promts 4", "--promts is unknown, did you mean '--prompts'"), ("--nonsense=4", "--nonsense=4 is unknown"), ("junk", "'junk' belongs to no flag"),
    *[(f"--{name} 0", f"--{name} is 0") for name in ("n", "steps", "prompts", "max-new-tokens", "lora-rank", "micro-batch-tokens", "eval-n", "limit",
                                                    "save-every", "temperature", "lr", "max-grad-norm")],
    *[(f"--{name} nan", f"--{name} is nan") for name in ("temperature", "lr", "max-grad-norm")], ("--lr inf", "--lr is inf"), ("--seed 2000000000", "--seed"), ("--eval-every -1", "is -1"),
    ("--n many", "--n: invalid int value: 'many'"), ("--max-new-tokens 30", "--max-new-tokens 30 exceed the model's context of 32 tokens"),
    ("--eval-n 4 --prompts 2 --top-p 0.9", "--top-p is not for training"), ("--top-k=5", "--top-k=5 is not for training"), ("--min-p 0.1", "--min-p"),
    ("--resume nowhere", "leave out --"), ("--data broken.jsonl", "broken.jsonl, line 2"), ("--data empty.jsonl", "holds no problems"),
    ("--data all-train.jsonl", "all-train.jsonl:test' holds no problems"), ("--data fine.jsonl --eval-data fine.jsonl", "nothing to train on"),
    ("--model Qwen2.5-Math-1.5B --data fine.jsonl --eval-data all-train.jsonl", "Qwen/Qwen2.5-Math-1.5B could not be loaded"),
    ("--model someone/model", "someone/model"), ("--sampler vllm", "vLLM is not installed")])
def test_what_cannot_work_is_refused_at_start_and_nothing_is_written(monkeypatch, tmp_path, flags, said):
    monkeypatch.chdir(tmp_path)
    for name, text in {"fine": '{"problem": "1+1", "answer": "2"}', "broken": '{"problem": "p", "answer": "1"}\nx', "empty": "",
                       "all-train": '{"problem": "in the training part", "answer": "1"}'}.items():
        (tmp_path / f"{name}.jsonl").write_text(text + "\n")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as refused:
        go(tmp_path / "run", *flags.split())
    assert said in str(refused.value) and "\n" not in str(refused.value) and sorted(tmp_path.iterdir()) == before


def test_a_run_directory_that_exists_is_refused_and_kept(tiny):
    before = {path: path.stat().st_mtime_ns for path in tiny.rglob("*")}
    with pytest.raises(UserError, match="exists already: go on with --resume"):
        go(tiny)
    assert {path: path.stat().st_mtime_ns for path in tiny.rglob("*")} == before


@pytest.mark.parametrize("flags, said", [(["--resume", "nowhere"], "nowhere: no run directory there"), (["--resume", str(ROOT / "toy")], "no run directory there")])
def test_there_must_be_something_to_resume(flags, said):
    with pytest.raises(UserError, match=said):
        train.main(flags)


# ---------------------------------------------------------------- 3. runs

def test_a_run_leaves_what_it_promises(tiny):
    names = {"config.json", "metrics.jsonl", "evals.jsonl", "samples.jsonl", "curves.png", "history.png", "step_000001", "step_000002", "step_000003"}
    assert {path.name for path in tiny.iterdir()} == names
    config, metrics, evals = json.loads((tiny / "config.json").read_text()), rows(tiny / "metrics.jsonl"), rows(tiny / "evals.jsonl")
    assert {"torch", "transformers", "peft"} <= set(config["versions"]) and config["flags"]["lr"] == 1e-3 and config["flags"]["n"] == 8
    assert [row["step"] for row in metrics] == [1, 2, 3] and len({tuple(row) for row in metrics}) == 1
    assert set(metrics[0]) >= {"k", "reward", "pass@1", "pass@k", "zero_weight_prompts", "skipped_steps", "truncated", "completion_tokens", "entropy",
                               "grad_norm", "logprob_gap_mean", "logprob_gap_max", "grader_failures", "sample_tokens_per_s", "learn_tokens_per_s",
                               "peak_memory_gb"}
    assert all(row["reward"] == pytest.approx(row["pass@1"]) and row["pass@1"] < row["pass@k"] and row["grad_norm"] > 0 for row in metrics)
    assert [row["step"] for row in evals] == [0, 2, 3] and all(len(row["rewards"]) == 4 and len(row["rewards"][0]) == 4 for row in evals)
    assert evals[0]["ids"] == [p.id for p in tasks.load_problems("countdown:test", 4)]
    for row in rows(tiny / "samples.jsonl"):
        assert [a["reward"] for a in row["answers"]] == [tasks.grade_countdown(a["text"], row["answer"]) * a["finished"] for a in row["answers"]]
    assert all((tiny / name).read_bytes()[:4] == b"\x89PNG" for name in ("curves.png", "history.png"))


@pytest.mark.parametrize("flags, ks", [
    ("--k 1", "1 1 1"), ("--k 1,4", "1,4 1,4 1,4"), ("--k 8:1", "8 6 3"), ("--baseline loo --temperature 0.8", "2 2 2"), ("--objective maxk", "2 2 2"),
    ("--objective maxk --data countdown-graded --baseline loo", "2 2 2"), ("--objective groupmax --k 4", "4 4 4")])
def test_every_objective_runs(tmp_path, capsys, flags, ks):
    metrics = rows(go(tmp_path / "run", *flags.split(), "--n", 8) / "metrics.jsonl")
    kind = "max" if "graded" in flags else "pass"
    assert [row["k"] for row in metrics] == ks.split() and all(f"{kind}@k" in row for row in metrics) and f"{kind}@4" in capsys.readouterr().out
    assert any(row["grad_norm"] > 0 for row in metrics) and all((row["logprob_gap_max"] or 0) < 1e-4 for row in metrics)


def test_at_k_1_the_first_step_of_a_run_is_reinforce_bit_for_bit(monkeypatch, tmp_path):
    seen, update = [], policy.update
    monkeypatch.setattr(policy, "update", lambda model, optimizer, rollouts, *a, **b: seen.extend(rollouts) or update(model, optimizer, rollouts, *a, **b))
    run = go(tmp_path / "run", "--k", 1, "--steps", 1, "--micro-batch-tokens", 1)
    model, tokenizer = policy.load_model("toy")
    model = policy.add_lora(model, rank=8, alpha=32, seed=5)
    parameters, qwen = [p for p in model.parameters() if p.requires_grad], model.base_model.model
    adam = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for rollout in sorted(seen, key=lambda rollout: -len(rollout.prompt_ids + rollout.completion_ids)):
        if reward := tasks.grade_countdown(rollout.text, tokenizer.decode(rollout.prompt_ids)[:-1]):
            ids, start = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]]), len(rollout.prompt_ids)
            logits = qwen.lm_head(qwen.model(ids).last_hidden_state[0, start - 1:-1])                       # (T, V)
            (-reward * (logits[range(len(logits)), ids[0, start:]] - logits.logsumexp(-1)).sum() / 24).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    adam.step()
    saved = policy.load_file(run / "step_000001" / "adapter_model.safetensors")
    assert len(seen) == 24 and len(saved) == len(parameters)
    assert all(torch.equal(saved[name.replace(".default", "")], p) for name, p in model.named_parameters() if p.requires_grad)


def test_another_architecture_with_a_chat_template_learns_from_a_file(monkeypatch, tmp_path, capsys):
    model, data = save_model("llama", tmp_path / "llama"), tmp_path / "sums.jsonl"
    (tmp_path / "llama" / "chat_template.jinja").write_text("\\boxed{{ '{}' }}{{ messages[0].content }}=")
    data.write_text("".join(json.dumps({"problem": f"{a}+{b}", "answer": a + b}) + "\n" for a in range(9) for b in range(9)))
    monkeypatch.setattr(tasks, "grade", lambda text, answer: float("1" in text))       # it never writes a box
    run = go(tmp_path / "run", "--model", model, "--data", data, "--max-new-tokens", 9, "--lr", 0.01)
    assert any(row["grad_norm"] > 0 for row in rows(run / "metrics.jsonl")) and json.loads((run / "config.json").read_text())["flags"]["data"] == f"{data}:train"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", str(run), model, "--n", "2", "--data", f"{data}:test", "--max-new-tokens", "9", "--limit", "3",
                                      "--out", str(tmp_path / "x.png")])
    evaluate.main()
    assert "over 3 problems" in capsys.readouterr().out


def test_a_run_of_a_relative_folder_can_be_used_from_anywhere(monkeypatch, tmp_path):
    shutil.copytree(ROOT / "toy", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    go("run", "--model", "model", "--data", "countdown", "--max-new-tokens", 12)
    monkeypatch.chdir(ROOT)
    assert os.path.samefile(policy.resolve_model(str(tmp_path / "run"))[0], tmp_path / "model")


def test_steps_without_signal_are_skipped_and_counted(monkeypatch, tmp_path):
    nothing = lambda rewards: [[0.0] * 8 for _ in rewards]
    on_batch(monkeypatch, 1, nothing)
    run = go(tmp_path / "run", "--lr", 0.01)
    metrics, (first, second) = rows(run / "metrics.jsonl"), (policy.load_file(run / f"step_00000{i}" / "adapter_model.safetensors") for i in (1, 2))
    assert metrics[0]["skipped_steps"] == 1 and metrics[0]["grad_norm"] == 0 and metrics[0]["zero_weight_prompts"] == 1
    assert metrics[0]["logprob_gap_mean"] is None and [row["step"] for row in metrics] == [1, 2, 3]
    assert all((value == 0).all() for name, value in first.items() if "lora_B" in name)             # as at the start
    assert (metrics[1]["skipped_steps"] == 1) == any((value != 0).any() for name, value in second.items() if "lora_B" in name)


# ---------------------------------------------------------------- 4. stopped and resumed

def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *KILLED, "--run", killed], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / "step_000002").exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL and policy.newest_checkpoint(killed).name < "step_000040"
    for name in ("metrics.jsonl", "evals.jsonl", "samples.jsonl"):
        with (killed / name).open("a") as file:
            file.write('{"step": 3, "half a li')
    train.main(["--resume", str(killed)])
    train.main([*KILLED, "--run", str(unbroken)])
    assert state(killed) == state(unbroken) and [row["step"] for row in rows(killed / "metrics.jsonl")] == list(range(1, 41))
    assert [row["step"] for row in rows(killed / "evals.jsonl")] == [0, 16, 32, 40]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_request_leaves_a_checkpoint_and_resumes_to_the_same_bits(monkeypatch, tmp_path, tiny, number, code):
    on_batch(monkeypatch, 2, lambda rewards: os.kill(os.getpid(), number) or rewards)
    with pytest.raises(SystemExit) as stopped:
        go(tmp_path / "run", "--eval-every", 2, "--save-every", 3)
    assert stopped.value.code == code and policy.newest_checkpoint(tmp_path / "run").name == "step_000002"
    train.main(["--resume", str(tmp_path / "run")])
    assert state(tmp_path / "run") == state(tiny)


@pytest.mark.parametrize("bad, said", [("reward", "a reward is nan"), ("loss", "the loss is nan"), ("sampler", "sampler and learner disagree")])
def test_bad_numbers_stop_the_run_with_a_checkpoint_and_it_resumes_to_the_same_bits(monkeypatch, tmp_path, tiny, bad, said):
    with monkeypatch.context() as patch:
        def poison(rewards):
            if bad == "loss":
                patch.setattr(rspo, "policy_gradient_loss", lambda *_: torch.tensor(float("nan")))
            return [[float("nan")] * 8] * 3 if bad == "reward" else rewards
        on_batch(patch, 2, poison)
        generate, calls = sample.HFSampler.generate, []

        def wrong(self, prompts, n, temperature, *rest):
            calls.extend([1] if len(prompts) == 3 else [])
            return generate(self, prompts, n, 0.5 if bad == "sampler" and len(calls) == 2 else temperature, *rest)
        patch.setattr(sample.HFSampler, "generate", wrong)
        with pytest.raises(UserError, match=f"step 2 was not applied: {said}.*(--resume|--model .*step_000001)") as stopped:
            go(tmp_path / "run", "--eval-every", 2, "--save-every", 3)
        assert "\n" not in str(stopped.value)
    adapters = [(run / "step_000001" / "adapter_model.safetensors").read_bytes() for run in (tmp_path / "run", tiny)]
    assert adapters[0] == adapters[1] and [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [1]
    train.main(["--resume", str(tmp_path / "run")])
    assert state(tmp_path / "run") == state(tiny)


def test_a_policy_that_blew_up_ends_in_a_sentence_and_is_not_saved(tmp_path):
    with pytest.raises(UserError, match="step 2 was not applied: the policy's probabilities are NaN.*lower --lr"):
        go(tmp_path / "run", "--lr", 1e30, "--save-every", 3)
    assert policy.newest_checkpoint(tmp_path / "run") is None


@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_stop_request_during_an_evaluation_acts_at_once(monkeypatch, tmp_path, tiny, step):
    original = sample.sample_problems

    def interrupted(*arguments, label, **rest):
        for i, group in enumerate(original(*arguments, label=label, **rest)):
            if i == 1 and label.endswith(f"step {step}"):
                os.kill(os.getpid(), signal.SIGTERM)
            assert i < 2 or not label.endswith(f"step {step}")
            yield group
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sample, "sample_problems", interrupted)
        go(tmp_path / "run", "--eval-every", 2, "--save-every", 3)
    assert stopped.value.code == 143 and policy.newest_checkpoint(tmp_path / "run").name == f"step_00000{step}"
    train.main(["--resume", str(tmp_path / "run")])
    assert state(tmp_path / "run") == state(tiny)


def test_a_4bit_run_with_8bit_adamw_and_recomputed_activations_resumes_and_is_evaluated_in_4_bits(monkeypatch, tmp_path):
    run = go(tmp_path / "run", "--load-in-4bit", "--adam-8bit", "--gradient-checkpointing")
    unbroken = state(run)
    shutil.rmtree(run / "step_000003")
    train.main(["--resume", str(run)])
    assert state(run) == unbroken and sample.sampling_defaults(str(run))["load_in_4bit"] is True
    assert max(row["logprob_gap_max"] for row in rows(run / "metrics.jsonl")) < 1e-4


def test_an_adapter_keeps_its_rank_and_its_base(tmp_path, tiny):
    args = train.parse_flags(["--model", str(tiny)])
    assert (args.lora_rank, args.load_in_4bit) == (json.loads((tiny / "config.json").read_text())["flags"]["lora_rank"], False)
    for flags, said in ((["--lora-rank", "3"], "--lora-rank is 3"), (["--load-in-4bit"], "--load-in-4bit is True")):
        with pytest.raises(UserError, match=f"{said}, but the adapter of .* has"):
            train.parse_flags(["--model", str(tiny), *flags])


def test_a_config_that_is_broken_or_of_another_version_is_said(tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    flags = json.loads(config.read_text())
    del flags["flags"]["adam_8bit"]
    for text, said in ((json.dumps(flags), "lacks the flag 'adam_8bit'.*another version"), ("{", "is not JSON")):
        config.write_text(text)
        with pytest.raises(UserError, match=said):
            train.main(["--resume", str(tmp_path / "run")])


def test_a_sampler_that_shares_the_gpu_sleeps_while_the_learner_works(monkeypatch, tmp_path):
    calls, update = [], policy.update
    monkeypatch.setattr(sample.HFSampler, "sleep", lambda self: calls.append("sleep"))
    monkeypatch.setattr(train, "sync", lambda *a, **k: calls.append("sync"))
    monkeypatch.setattr(policy, "update", lambda *a, **k: calls.append("learn") or update(*a, **k))
    go(tmp_path / "run")
    assert calls == ["sleep", "sync"] + ["sleep", "learn", "sync"] * 3


@pytest.mark.parametrize("left", [0, 1, 3])
def test_a_run_resumes_from_whatever_checkpoint_is_left(monkeypatch, tmp_path, tiny, left):
    shutil.copytree(tiny, tmp_path / "run")
    for step in range(left + 1, 4):
        shutil.rmtree(tmp_path / "run" / f"step_00000{step}")
    (tmp_path / "run" / ".step_000002.unfinished").mkdir()
    train.main(["--resume", str(tmp_path / "run")])               # 0: from its start; 3: nothing left to do
    assert state(tmp_path / "run") == state(tiny)


def test_grader_failures_are_counted_across_a_resume(monkeypatch, tmp_path):
    original = tasks.grade_all

    def grade_all(problems, groups):
        tasks.graders().failures += 1
        return original(problems, groups)
    monkeypatch.setattr(tasks, "grade_all", grade_all)
    tasks.graders.cache_clear()
    run = go(tmp_path / "run")
    unbroken = state(run)
    shutil.rmtree(run / "step_000003")
    tasks.graders.cache_clear()                                   # a new process
    train.main(["--resume", str(run)])
    assert state(run) == unbroken


def test_samples_with_odd_line_ends_do_not_stop_a_resume(monkeypatch, tmp_path):
    decode = sample.make_rollout
    monkeypatch.setattr(sample, "make_rollout", lambda *a: sample.Rollout(**{**vars(r := decode(*a)), "text": r.text + "\u2028\x85"}))
    run = go(tmp_path / "run")
    before = state(run)
    shutil.rmtree(run / "step_000003")
    train.main(["--resume", str(run)])
    assert state(run) == before


def test_tensorboard_shows_the_columns_of_every_step_across_a_resume(monkeypatch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    whole = go(tmp_path / "whole", "--tensorboard")
    shutil.rmtree(whole / "step_000003")
    train.main(["--resume", str(whole)])
    board = EventAccumulator(str(whole / "tensorboard"))
    board.Reload()
    logged = rows(whole / "metrics.jsonl")
    for name in ("reward", "pass@k", "entropy"):
        assert [event.step for event in board.Scalars(name)] == [1, 2, 3]
        assert [event.value for event in board.Scalars(name)] == pytest.approx([row[name] for row in logged], rel=1e-6)
