"""Proof that a run survives what machines do to it. Each test's name is the promise it holds.

1. Killed at any moment, inside checkpoint writing too, training and evaluation end in the same bits as if nothing had been.
2. Ctrl-C and SIGTERM leave a checkpoint; a second one leaves at once and loses no finished checkpoint.
3. What a disk does is recognised by checksums and said in one sentence; the newest whole checkpoint is used or named.
4. Numbers that are not finite are never applied, and the sample to blame is written down; a collapse is announced.
5. Nobody gets in: no pickle, no code of a checkpoint, no path out of the run directory.
6. Out of memory halves the micro-batch once, with the gradient of the half; nothing is left behind.
7. Two runs at once are refused; clocks, places and cores do not matter.

RSPO_KILLS=30 python -m pytest tests/test_faults.py -k killed      is the long version of part 1 (here 4 kills)
"""

import importlib.util
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import transformers as tf

import evaluate
import policy
import sample
import tasks
import train
from conftest import ROOT
from tasks import UserError
from test_policy import gradients, learner, folder, make_rollouts, same, save_model, step, values  # noqa: F401  (fixtures too)
from test_train import go, on_batch, quick, rows, state, tiny  # noqa: F401
from toy.pretrain import make_tokenizer

KILLS = int(os.environ.get("RSPO_KILLS", 4))
SHORT = "--prompts 4 --n 8 --k 2 --limit 6 --eval-n 4 --save-every 1 --keep 2 --steps 12 --eval-every 5 --seed 5".split()
PROCESSES = multiprocessing.get_context("forkserver")       # the server imports once, so that each process starts in no time
PROCESSES.set_forkserver_preload(["train"])


def script(main: str, argv: list[str], grading_s: float) -> None:
    """What a process of this file does: run a script quietly, without figures, grading as slowly as asked."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1), os.dup2(1, 2)
    for module in (train.evaluate, evaluate):
        module.plot = module.plot_history = lambda *_: None
    grade_all = tasks.grade_all
    tasks.grade_all = lambda *args: time.sleep(grading_s) or grade_all(*args)
    if main == "evaluate":
        sample.HFSampler.block_tokens = 5 * 16 * 20         # five problems at a time: many moments to be killed at
    sys.argv = [f"{main}.py", *argv]
    sample.run_script({"train": train, "evaluate": evaluate}[main].main)


def start(main: str, *argv, grading_s: float = 0):
    process = PROCESSES.Process(target=script, args=(main, [str(word) for word in argv], grading_s))
    process.start()
    return process


def wait_for(what, process, seconds=120):
    end = time.monotonic() + seconds
    while not what() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.001)


def copy_of(run, place):
    return Path(shutil.copytree(run, place))


def spoil(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"flipped": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "truncated": data[:-40], "empty": b""}[how])


def seal(checkpoint):
    """Make a checkpoint whole again after a change."""
    (checkpoint / "SHA256SUMS").write_text("".join(f"{policy._digest(path)}  {path.name}\n" for path in sorted(checkpoint.iterdir())
                                                   if path.name != "SHA256SUMS"))


# ---------------------------------------------------------------- 1. killed

def kill_until_done(begin, changed, rng, most):
    """Start a process again and again, kill it at random moments, `most` times or until it is done: how many kills, how many in the midst of a write."""
    kills = inside = 0
    while True:
        before = changed()
        process = begin()
        if kills == most:
            process.join()
        elif kills % 2:
            wait_for(lambda: changed() != before, process)              # just now something is being written
            time.sleep(rng.uniform(0, 0.02))
        else:
            process.join(rng.uniform(0.2, 4))
        writing = changed() != before
        process.kill()
        process.join()
        if process.exitcode == 0:
            return kills, inside
        assert process.exitcode == -signal.SIGKILL
        kills, inside = kills + 1, inside + writing


@pytest.mark.parametrize("sampler", ["hf", pytest.param("vllm", marks=pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM"))])
def test_training_killed_at_random_moments_ends_in_the_same_bits(tmp_path, sampler):
    flags, unbroken, rng, kills, inside, number = [*SHORT, "--sampler", sampler], tmp_path / "unbroken", random.Random(KILLS), 0, 0, 0
    whole = start("train", *flags, "--run", unbroken)
    whole.join()
    assert whole.exitcode == 0
    while kills < KILLS:
        run, newest, number = tmp_path / str(number), [], number + 1

        def begin():
            found = policy.newest_checkpoint(run)
            newest.append(int(found.name[5:]) if found else -1)
            assert newest == sorted(newest), "a finished checkpoint was lost"
            return start("train", *(["--resume", run] if run.exists() else [*flags, "--run", run]))
        being_written = lambda: {(path, path.stat().st_ctime_ns) for path in run.glob(".step_*.unfinished") if path.exists()}
        more, within = kill_until_done(begin, being_written, rng, KILLS - kills)
        kills, inside = kills + more, inside + within
        assert state(run) == state(unbroken) and [path.name for path in policy.checkpoints(run)] == ["step_000011", "step_000012"]
        assert (run / "step_000012" / "SHA256SUMS").read_bytes() == (unbroken / "step_000012" / "SHA256SUMS").read_bytes()
    print(f"\n{sampler}: {kills} kills, {inside} of them while a checkpoint was being written")


def test_evaluation_killed_at_random_moments_ends_in_the_same_bits(tmp_path):
    flags, rng, kills, number = ["--n", 16, "--limit", 200], random.Random(KILLS), 0, 0
    results = lambda name: [path.read_bytes() for path in sorted(tmp_path.glob(f"{name}*/*"))] + [(tmp_path / f"{name}.json").read_bytes()]
    start("evaluate", *flags, "--out", tmp_path / "unbroken.png").join()
    while kills < KILLS:
        written = lambda: sum(path.stat().st_size for path in tmp_path.glob(f"{number}*/*"))
        more, _ = kill_until_done(lambda: start("evaluate", *flags, "--out", tmp_path / f"{number}.png"), written, rng, KILLS - kills)
        assert results(str(number)) == results("unbroken") and len(results("unbroken")[0].splitlines()) == 200
        kills, number = kills + more, number + 1
    print(f"\nevaluation: {kills} kills")


# ---------------------------------------------------------------- 2. asked to stop

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_leaves_at_once_and_loses_no_finished_checkpoint(tmp_path, tiny, number):
    run = copy_of(tiny, tmp_path / "run")
    shutil.rmtree(run / "step_000003")
    process = start("train", "--resume", run, grading_s=60)
    before = (run / "metrics.jsonl").stat().st_mtime_ns
    wait_for(lambda: (run / "metrics.jsonl").stat().st_mtime_ns != before, process)         # cut back: the third step has begun
    time.sleep(0.5)
    os.kill(process.pid, number)
    time.sleep(0.5)
    assert process.is_alive(), "the first one waits for the step"
    os.kill(process.pid, number)
    process.join(5)
    assert process.exitcode == -number and policy.newest_checkpoint(run).name == "step_000002"
    train.main(["--resume", str(run)])
    assert state(run) == state(tiny)


def test_ctrl_c_before_the_first_step_is_a_sentence_and_130(capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as stopped:
        sample.run_script(lambda: signal.raise_signal(signal.SIGINT))
    assert stopped.value.code == 130 and "nothing that was finished is lost" in capsys.readouterr().err


# ---------------------------------------------------------------- 3. disks

@pytest.mark.parametrize("how", ["flipped", "truncated", "missing", "empty"])
@pytest.mark.parametrize("name", [*sorted(policy.CHECKPOINT_FILES), "SHA256SUMS"])
def test_a_damaged_checkpoint_is_recognised_and_the_newest_whole_one_is_used(tmp_path, capsys, tiny, name, how):
    run = copy_of(tiny, tmp_path / "run")
    spoil(run / "step_000003" / name, how)
    assert policy.newest_checkpoint(run).name == "step_000002" and policy.newest_checkpoint(run).name == "step_000002"
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "step_000003 is left aside" in said and ("missing" if how == "missing" else "damaged") in said
    if how != "missing" or name not in ("adapter_config.json", "SHA256SUMS"):       # without these it is just a folder
        with pytest.raises(UserError, match="step_000003 is not whole: .*the newest whole one there is .*step_000002"):
            policy.resolve_model(str(run / "step_000003"))


def test_a_run_with_a_damaged_checkpoint_resumes_to_the_same_bits(tmp_path, tiny):
    run = copy_of(tiny, tmp_path / "run")
    spoil(run / "step_000003" / "adapter_model.safetensors", "flipped"), spoil(run / "step_000002" / "state.json", "missing")
    train.main(["--resume", str(run)])
    assert state(run) == state(tiny) and [policy.flaw(path) for path in policy.checkpoints(run)] == [None] * 3


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew_over_its_records(tmp_path, tiny):
    run = copy_of(tiny, tmp_path / "run")
    for checkpoint in policy.checkpoints(run):
        spoil(checkpoint / "optimizer.safetensors", "truncated")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="no checkpoint of .* is whole"):
        train.main(["--resume", str(run)])
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("other", ["model", "version of train.py"])
def test_a_checkpoint_of_another_model_or_version_is_said(tmp_path, tiny, other):
    run, model = copy_of(tiny, tmp_path / "run"), copy_of(policy.TOY, tmp_path / "model")
    if other == "model":                                            # same names, same shapes, other weights
        weights = policy.load_file(model / "model.safetensors")
        policy.save_file({name: value * 1.5 for name, value in weights.items()}, model / "model.safetensors", {"format": "pt"})
        config = json.loads((run / "config.json").read_text())
        config["flags"]["model"] = str(model)
        (run / "config.json").write_text(json.dumps(config))
    else:
        saved = json.loads((run / "step_000003" / "state.json").read_text())
        (run / "step_000003" / "state.json").write_text(json.dumps({**saved, "format": policy.FORMAT + 1}))
        seal(run / "step_000003")
    with pytest.raises(UserError, match=f"step_000003 was written with another {other}; move it away"):
        train.main(["--resume", str(run)])


@pytest.mark.parametrize("keep, left", [(0, [1, 2, 3]), (1, [3]), (2, [2, 3]), (9, [1, 2, 3])])
def test_keep_prunes_the_oldest_checkpoints(tmp_path, keep, left):
    run = go(tmp_path / "run", "--keep", keep)
    assert [path.name for path in policy.checkpoints(run)] == [f"step_{i:06d}" for i in left] and not list(run.glob(".step*"))


def test_keep_never_removes_the_last_whole_checkpoint(tmp_path, learner):  # noqa: F811
    model = learner()
    save = lambda step, keep=0: policy.save_checkpoint(tmp_path, step, model, torch.optim.AdamW(policy.trainable(model).values()), {}, keep)
    for number in (10, 20, 30):
        save(number)
    spoil(tmp_path / "step_000030" / "adapter_model.safetensors", "flipped")
    save(21, keep=1)                                                # went on from 20: 30 is newer by its name and not whole
    assert policy.newest_checkpoint(tmp_path).name == "step_000021" and not (tmp_path / "step_000020").exists()
    save(30, keep=1)                                                # written anew over the damaged one
    assert [path.name for path in policy.checkpoints(tmp_path)] == ["step_000030"] and policy.flaw(tmp_path / "step_000030") is None


@pytest.mark.parametrize("keep", range(1, 8))
def test_keep_leaves_that_many_however_long_the_run(tmp_path, learner, keep):  # noqa: F811
    model = learner()
    for number in range(1, 9):
        policy.save_checkpoint(tmp_path, number, model, torch.optim.AdamW(policy.trainable(model).values()), {}, keep)
        assert [int(path.name[5:]) for path in policy.checkpoints(tmp_path)] == list(range(max(1, number - keep + 1), number + 1))


def test_checkpoints_are_sorted_by_number_and_copies_are_left_alone(tmp_path, tiny):
    for name in ("step_999999", "step_1000000", "step_000001.bak", "step_2"):
        copy_of(tiny / "step_000003", tmp_path / name)
    assert policy.newest_checkpoint(tmp_path).name == "step_1000000" and len(policy.checkpoints(tmp_path)) == 2


@pytest.mark.parametrize("full", ["checkpoint", "log"])
def test_a_full_disk_is_a_sentence_and_the_run_resumes_to_the_same_bits(monkeypatch, tmp_path, tiny, full):
    run, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(rewards):
        if full == "log":
            (run / "metrics.jsonl").rename(tmp_path / "aside")
            (run / "metrics.jsonl").symlink_to("/dev/full")
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))         # below an adapter's size
        return rewards
    with monkeypatch.context() as patch, pytest.raises(UserError) as stopped:
        on_batch(patch, 2, fill)
        try:
            go(run, "--eval-every", 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if full == "log":
        (tmp_path / "aside").replace(run / "metrics.jsonl")
    said = str(stopped.value)
    assert re.search("No space left" if full == "log" else "step_000002 could not be written .*File too large", said) and "\n" not in said
    assert "its newest whole checkpoint is " in said and f"step_000001: make room, or make it writable, and go on with --resume {run}" in said
    assert not list(run.glob(".step*")), "what was half written gives its room back"
    train.main(["--resume", str(run)])
    assert state(run) == state(tiny)


def test_a_read_only_run_directory_is_a_sentence(tiny):
    place = Path(tempfile.mkdtemp())
    try:
        run = copy_of(tiny, place / "run")
        for path in (*run.rglob("*"), run, place):
            path.chmod(0o555 if path.is_dir() else 0o444)
        if os.geteuid() == 0:                                       # to whom nothing is read-only
            os.seteuid(65534)
        with pytest.raises(UserError, match="stopped: .*Permission denied.*newest whole checkpoint is .*step_000003.*writable"):
            train.main(["--resume", str(run)])
        with pytest.raises(UserError, match="run directory .* cannot be made: Permission denied"):
            train.write_config(place / "new", train.parse_flags(["--run", str(place / "new")]))
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        place.chmod(0o755), [path.chmod(0o755) for path in place.rglob("*") if path.is_dir()]
        shutil.rmtree(place)


def test_a_damaged_log_is_named_and_kept(tmp_path, tiny):
    run = copy_of(tiny, tmp_path / "run")
    (run / "metrics.jsonl").write_bytes(b"\0\0\0\n" + (run / "metrics.jsonl").read_bytes())
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="metrics.jsonl is damaged"):
        train.main(["--resume", str(run)])
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_directory_appears_with_its_config_or_not_at_all(monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot be made"):
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        go(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    go(tmp_path / "run", "--steps", 1)                              # and the name is free


# ---------------------------------------------------------------- 4. numbers

@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_reward_that_is_not_finite_is_not_applied_and_its_sample_is_written_down(monkeypatch, tmp_path, value):
    seen, original = [], tasks.grade_all

    def grade_all(problems, groups):
        rewards = original(problems, groups)
        if len(problems) == 3:
            rewards[1][6] = float(value)
            seen.append((problems[1], groups[1][6]))
        return rewards
    monkeypatch.setattr(tasks, "grade_all", grade_all)
    with pytest.raises(UserError, match=f"step 1 was not applied: a reward is {value}"):
        go(tmp_path / "run", "--objective", "maxk")
    (problem, (text, finished)), row = seen[0], rows(tmp_path / "run" / "failures.jsonl")[0]
    assert (row["step"], row["error"], row["id"], row["question"]) == (1, f"a reward is {value}", problem.id, problem.question)
    assert (row["text"], row["finished"]) == (text, finished) and row["completion_ids"] and row["logprobs"]


class Poison(torch.autograd.Function):
    """The same values; a gradient that is infinite where asked."""

    @staticmethod
    def forward(context, logprobs, bad):
        context.save_for_backward(bad)
        return logprobs.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient.masked_fill(context.saved_tensors[0], float("inf")), None


@pytest.mark.parametrize("budget", [1, 10**6])
@pytest.mark.parametrize("bad, said", [("learner", "log-probability of a token is nan"), ("sampler", "sampler's log-probability of a token is -inf"),
                                       ("weight", "weight of a token is inf"), ("gradient", "gradient norm is (nan|inf)")])
def test_the_sample_behind_a_bad_number_is_found_and_nothing_is_applied(monkeypatch, learner, budget, bad, said):  # noqa: F811
    model, rollouts, weights, original = learner(), make_rollouts(8), torch.tensor([0., 1, 1, 0, 1, 1, 1, 1]), policy.token_logprobs
    optimizer, guilty = torch.optim.AdamW(policy.trainable(model).values(), lr=1e-2), 4
    if bad == "sampler":
        rollouts[guilty] = sample.Rollout(**{**vars(rollouts[guilty]), "logprobs": (float("-inf"), *rollouts[guilty].logprobs[1:])})
    if bad == "weight":
        weights[guilty] = float("inf")

    def poisoned(model, chosen, temperature):
        logprobs, owner = original(model, chosen, temperature)
        mine = torch.tensor([chosen[i] is rollouts[guilty] for i in owner])
        return (Poison.apply(logprobs, mine) if bad == "gradient" else logprobs.masked_fill(mine & (bad == "learner"), float("nan"))), owner
    monkeypatch.setattr(policy, "token_logprobs", poisoned)
    before = values(model)
    with pytest.raises(policy.BadNumbers, match=said) as found:
        step(model, optimizer, rollouts, weights, budget, importance_cap=2.0)
    assert found.value.index == guilty and same(values(model), before) and not optimizer.state


@pytest.mark.parametrize("change, alarm, advice", [
    ({"entropy": 0.01}, "entropy", "lower --lr or raise --k"), ({"reward": 0.99, "zero_weight_prompts": 1.0}, "solved", "harder --data"),
    ({"zero_weight_prompts": 1.0}, "zero", "easier or harder --data"), ({"truncated": 1.0}, "truncated", "raise --max-new-tokens"),
    ({"grad_norm": 50.0}, "norm", "lower --lr")])
def test_a_collapse_is_announced_with_what_to_change(change, alarm, advice):
    healthy = {"reward": 0.3, "entropy": 4.0, "zero_weight_prompts": 0.3, "truncated": 0.1, "logprob_gap_mean": 0.0, "grad_norm": 2.0}
    assert train.tripwires(healthy, 1.0) == {}
    alarms = train.tripwires({**healthy, **change}, 1.0)
    assert list(alarms) == [alarm] and advice in alarms[alarm]


def test_an_exploding_gradient_norm_is_announced_once_against_the_usual_one(tmp_path, capsys, tiny):
    log, row = train.RunLog(copy_of(tiny, tmp_path / "run"), 3), {**rows(tiny / "metrics.jsonl")[0], "reward": 0.3, "zero_weight_prompts": 0.3}
    for number, norm in enumerate([90.0, *[1.0] * 9, 0.0, 19.0, 21.0, 500.0, 1.0], 1):      # early ones have nothing to be held against
        log.step({**row, "step": number, "grad_norm": norm}, 10**6)
    said = [line for line in capsys.readouterr().out.splitlines() if "usually it was" in line]
    assert len(said) == 1 and said[0].startswith("step 13: the gradient norm is 21, usually it was 1")


# ---------------------------------------------------------------- 5. nobody in

def test_the_scripts_use_no_pickle_no_eval_and_no_remote_code():
    for path in ROOT.glob("*.py"):
        assert not re.search(r"\bpickle\b(?!\.|,|;| is)|(?<![.\w])(eval|exec)\(|torch\.(load|save)\(|trust_remote_code=True|shell=True|os\.system",
                             re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.S)), path.name


def test_code_that_a_model_folder_brings_is_not_run(tmp_path):
    model, marker = Path(save_model("qwen2", tmp_path / "model")), tmp_path / "it ran"
    (model / "own.py").write_text(f"open({str(marker)!r}, 'w')\nfrom transformers import Qwen2Config as C, Qwen2ForCausalLM as M\n")
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((model / name).read_text())
        config["auto_map"] = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", None]}
        config["model_type"] = "qwen2" if name == "config.json" and "qwen2" in str(model) else "its-own"
        (model / name).write_text(json.dumps(config))
    with pytest.raises(UserError):
        policy.load_model(str(model))
    assert not marker.exists()


def test_an_adapter_in_a_pickle_is_refused(tmp_path, tiny):
    adapter = copy_of(tiny / "step_000003", tmp_path / "adapter")
    torch.save(policy.load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink(), (adapter / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match="no adapter_model.safetensors, the only form"):
        policy.load_model(str(adapter))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"r": 8}', '{"base_model_name_or_path": null, "r": 8, "lora_alpha": 8}',
                                  '{"base_model_name_or_path": "toy", "r": "8", "lora_alpha": 8}', "[" * 10**5])
def test_a_broken_adapter_config_is_one_sentence(tmp_path, tiny, text):
    adapter = copy_of(tiny / "step_000003", tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(text), (adapter / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match="adapter_config.json is not that of a LoRA adapter") as refused:
        policy.resolve_model(str(adapter))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("run", ["../x", "runs/../../x", ".."])
def test_a_run_name_that_leads_out_is_refused(monkeypatch, tmp_path, run):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"--run is {run}, but must not hold '..'")):
        train.parse_flags(["--run", run])


@pytest.mark.parametrize("name", ["../x", "a/../../x", ".."])
def test_an_id_that_leads_out_is_refused(tmp_path, name):
    (tmp_path / "d.jsonl").write_text(json.dumps({"id": name, "problem": "p", "answer": "1"}))
    with pytest.raises(UserError, match=re.escape(f"d.jsonl, line 1: the id {name!r} must not hold '..'")):
        tasks.load_problems(f"{tmp_path}/d.jsonl")


def test_a_model_without_an_end_token_is_refused_and_one_without_a_pad_token_works(tmp_path):
    tokenizer, model = make_tokenizer(), tf.AutoModelForCausalLM.from_pretrained(policy.TOY)
    tokenizer.pad_token = tokenizer.eos_token = None
    for eos in (1, None):
        model.config.pad_token_id = model.generation_config.pad_token_id = None
        model.config.eos_token_id = model.generation_config.eos_token_id = eos
        model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
        flags = ["--model", tmp_path / "model", "--data", "countdown", "--max-new-tokens", 12, "--steps", 1]
        if eos:
            metrics = rows(go(tmp_path / "run", *flags) / "metrics.jsonl")
            assert metrics[0]["truncated"] < 0.5 and metrics[0]["logprob_gap_max"] < 1e-4
            sampler = sample.HFSampler(*policy.load_model(str(tmp_path / "model")))
            assert [len(group) for group in sampler.generate([(4, 5), (4, 5, 6, 7)], 2, 1.0, 4, seed=0)] == [2, 2]      # padded
        else:
            with pytest.raises(UserError, match="name an end token"):
                go(tmp_path / "other", *flags)
            assert not (tmp_path / "other").exists()


def test_an_architecture_that_peft_refuses_is_one_sentence(tmp_path):
    config = tf.MambaConfig(vocab_size=23, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=1, pad_token_id=0)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    make_tokenizer().save_pretrained(tmp_path / "mamba")
    with pytest.raises(UserError, match="PEFT puts no adapter on the linear layers of mamba models") as refused:
        go(tmp_path / "run", "--model", tmp_path / "mamba", "--data", "countdown", "--max-new-tokens", 12)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


# ---------------------------------------------------------------- 6. memory

@pytest.fixture
def memory_for(monkeypatch):
    """A machine whose memory takes so many tokens of a backward pass."""
    original = policy.token_logprobs

    def limit(tokens):
        def token_logprobs(model, rollouts, temperature):
            needed = len(rollouts) * max(len(r.prompt_ids) + len(r.completion_ids) for r in rollouts)
            if torch.is_grad_enabled() and needed > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore of it")
            return original(model, rollouts, temperature)
        monkeypatch.setattr(policy, "token_logprobs", token_logprobs)
    return limit


def test_out_of_memory_halves_the_micro_batch_once_with_the_very_gradient_of_the_half(tmp_path, capsys, memory_for):
    halved = go(tmp_path / "halved", "--micro-batch-tokens", 32)
    memory_for(40)
    run = go(tmp_path / "run", "--micro-batch-tokens", 65)
    assert state(run) == state(halved)
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert len(said) == 1 and "from now on --micro-batch-tokens is 32" in said[0]


def test_out_of_memory_a_second_time_stops_with_a_sentence_and_a_checkpoint(tmp_path, capsys, memory_for):
    memory_for(5)
    with pytest.raises(UserError, match="step 1 was not applied: the memory does not suffice to learn 32 tokens at once.*--resume") as stopped:
        go(tmp_path / "run", "--micro-batch-tokens", 65)
    assert "\n" not in str(stopped.value) and policy.newest_checkpoint(tmp_path / "run").name == "step_000000"
    assert capsys.readouterr().out.count("out of memory") == 1


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")
def test_a_run_leaves_no_descriptor_and_no_process_behind(tmp_path, tiny):
    count = lambda: (len(os.listdir("/proc/self/fd")), Path(f"/proc/self/task/{os.getpid()}/children").read_text())
    go(tmp_path / "first", "--steps", 1)
    before = count()
    for name in ("a", "b", "c"):
        go(tmp_path / name, "--steps", 1)
    assert count() == before


def test_adapters_that_a_killed_process_left_in_ram_are_removed_and_those_of_a_living_one_stay():
    made, report = [], PROCESSES.SimpleQueue()
    for _ in range(2):
        process = PROCESSES.Process(target=hold_adapters, args=(report,))
        process.start()
        made.append((process, Path(report.get())))
    made[0][0].kill(), made[0][0].join()
    own = sample.adapter_folder()
    try:
        assert not made[0][1].exists() and made[1][1].is_dir() and own.is_dir()
    finally:
        made[1][0].kill(), made[1][0].join(), shutil.rmtree(own), shutil.rmtree(made[1][1])


def hold_adapters(report):
    report.put(str(sample.adapter_folder()))
    time.sleep(600)


def test_a_grading_worker_that_hangs_ends_without_the_parent_that_would_kill_it(monkeypatch):
    monkeypatch.setattr(tasks.Graders, "_start", staticmethod(tasks.Graders._start))
    worker = tasks.Graders._start()
    worker.stdin.write(json.dumps(["judge", r"\boxed{(((9^{9999})^{9999})^{9999})\pi}", r"\pi"]) + "\n")
    worker.stdin.close()                                            # all that is left of a parent that was killed
    assert worker.wait(2 * tasks.GRADE_LIMIT_S + 20) == -signal.SIGALRM


# ---------------------------------------------------------------- 7. two at once, and what does not matter

def test_a_second_process_on_a_run_directory_or_samples_file_is_refused(monkeypatch, tmp_path, tiny):
    run = copy_of(tiny, tmp_path / "run")
    shutil.rmtree(run / "step_000003")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(policy, "load_model", lambda *_, **__: pytest.fail("refused too late"))
    with train.claimed(run), pytest.raises(UserError, match="run directory .* is in use by another train.py"):
        train.main(["--resume", str(run)])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    (tmp_path / "s.jsonl").touch()
    with tasks.locked(tmp_path / "s.jsonl", ""), pytest.raises(UserError, match="s.jsonl is being written by another process"):
        sample.sample_to_file(tmp_path / "s.jsonl", {}, [], None, [])


def test_a_run_holds_its_directory_while_it_trains(monkeypatch, tmp_path):
    refused = []

    def intrude(rewards):
        refused.append(pytest.raises(UserError, train.main, ["--resume", str(tmp_path / "run")]))
        return rewards
    on_batch(monkeypatch, 2, intrude)
    go(tmp_path / "run")
    assert "in use by another train.py" in str(refused[0].value)


def test_a_moved_run_another_clock_and_another_number_of_cores_are_harmless(monkeypatch, tmp_path, tiny):
    run = copy_of(tiny, tmp_path / "before")
    shutil.rmtree(run / "step_000003"), shutil.rmtree(run / "step_000002")
    run = run.rename(tmp_path / "moved")
    for path in run.rglob("*"):
        os.utime(path, (631152000, 631152000))                      # 1990
    clock = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))   # runs backwards
    cores, threads = getattr(os, "sched_getaffinity", lambda _: None)(0), torch.get_num_threads()
    if cores:
        os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(2)
    try:
        train.main(["--resume", str(run)])
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
    assert state(run) == state(tiny)
