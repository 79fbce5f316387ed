"""Proof that a run survives what machines do to it. Each test's name is the promise it holds.

1. However a run ends, and whatever happens to what it left, it goes on to the same bits.
2. Killed at random moments, inside checkpoint writing too, training and evaluation end in the
   same bits as if nothing had been. A second Ctrl-C leaves at once and loses no checkpoint.
3. What cannot go on is said in one sentence, and nothing is lost by the attempt.
4. Numbers that are not finite are never applied, and the answer to blame is written down.
5. Nobody gets in: no pickle, no code of a checkpoint, no path out of the run directory.
6. Out of memory halves the micro-batch, for good, with the gradient of the half. Nothing is left
   behind, and two processes never write to one run.

RSPO_KILLS=30 python -m pytest tests/test_faults.py -k killed    the long version (here 4 kills)
"""

import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from conftest import ROOT, has_cpu_vllm
from safetensors.torch import load_file, save_file
from test_policy import save_model
from test_train import UNBROKEN, go, on_batch, quick, rows, state, tiny  # noqa: F401

import evaluate
import sample
import train
from lib import cli, marker, policy, run, tasks
from lib.cli import UserError

KILLS = int(os.environ.get("RSPO_KILLS", 4))
SHORT = ("--prompts 4 --n 8 --k 2 --limit 6 --eval-n 4 --save-every 1 --steps 12 --eval-every 5 "
         "--seed 5 --flip 0.2").split()
PROCESSES = multiprocessing.get_context("forkserver")  # its server imports once for all
PROCESSES.set_forkserver_preload(["train"])
NAN, INF = float("nan"), float("inf")
FILE_SIZES = resource.getrlimit(resource.RLIMIT_FSIZE)
RECORDS = ("metrics.jsonl", "evals.jsonl")
GAME = ["--data", "divisor", "--max-new-tokens", 12]  # for a model that is not the toy
TOKENIZER = tf.AutoTokenizer.from_pretrained(run.TOY)


def copy_of(folder, place):
    return Path(shutil.copytree(folder, place))


def spoil(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"flipped": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
                          "truncated": data[:-40], "empty": b""}[how])


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("step_*"))


# ---------------------------------------------------------------- 1. (how it ends) x (what holds)

def in_step_2(act, save_every=3):
    """A run in whose second step, while its answers are graded, act(folder, patch) happens."""
    def end(folder, patch, _):
        on_batch(patch, 2, lambda *_: act(folder, patch))
        go(folder, *UNBROKEN, "--save-every", save_every)
    return end


def stopped_in_evaluation(step):
    """SIGTERM in the first of four blocks of the evaluation at this step."""
    def end(folder, patch, _):
        original = sample.sample_blocks

        def sample_blocks(*arguments):
            for i, block in enumerate(original(*arguments)):
                if arguments[3][1:] == ("evaluate", step):
                    assert i == 0, "it went on with the evaluation"
                    signal.raise_signal(signal.SIGTERM)
                yield block
        patch.setattr(sample, "sample_blocks", sample_blocks)
        go(folder, *UNBROKEN, "--save-every", 3)
    return end


def nan_loss(_, patch):
    patch.setattr(policy.rspo, "policy_gradient_loss", lambda logprobs, *_: logprobs.sum() * NAN)


def gap(_, patch):
    sampled = policy.sampled_logprobs
    patch.setattr(policy, "sampled_logprobs", lambda rollouts: sampled(rollouts) - 0.1)


def no_memory(_, patch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore of it")
    patch.setattr(policy, "token_logprobs", exhausted)


def full_log(folder, _):
    (folder / "metrics.jsonl").rename(folder / "aside")
    (folder / "metrics.jsonl").symlink_to("/dev/full")


def full_disk(*_):
    """No room for an adapter."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, FILE_SIZES[1]))


def stop():
    signal.raise_signal(signal.SIGTERM)


def full_disk_and(what):
    def act(*_):
        full_disk()
        return what()
    return act


def left(happens):
    """The unbroken run, and then this happens to its directory."""
    def end(folder, patch, tiny):
        copy_of(tiny, folder)
        happens(folder)
    return end


def damaged(how, *names):
    """Files of the newest checkpoint and, if there is a second name, of the one before it."""
    return left(lambda folder: [spoil(folder / f"step_00000{3 - i}" / name, how)
                                for i, name in enumerate(names)])


def only(step):
    return left(lambda folder: [shutil.rmtree(folder / f"step_00000{i}")
                                for i in range(step + 1, 4)])


def killed_in_a_write(folder):
    """What kill -9 leaves: half a row in each record, half a checkpoint, vLLM's adapter."""
    shutil.rmtree(folder / "step_000003")
    for name in RECORDS:
        with (folder / name).open("a") as file:
            file.write('{"step": 3, "half a li')
    for name in (".step_000003.unfinished", ".adapter"):
        (folder / name).mkdir()
        (folder / name / "half a file").write_text("x")


def old_clock(folder):
    shutil.rmtree(folder / "step_000003")
    for path in folder.rglob("*"):
        os.utime(path, (631152000, 631152000))  # 1990


SKIPPED = "UserError: step 2 was not applied: "
ROOM = "; make room, or make it writable, and {go on}"
ENDINGS = {  # name: how it ends, what it says, the newest whole checkpoint
    **{f"signal {number}": (in_step_2(lambda *_, number=number: signal.raise_signal(number)),
                            f"SystemExit: {code} .*step_000002 is whole, {{go on}}", 2)
       for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143))},
    **{f"signal in evaluation {step}": (stopped_in_evaluation(step), "SystemExit: 143 ", step)
       for step in (0, 2, 3)},
    "NaN reward": (in_step_2(lambda *_: [[NAN] * 8] * 3),
                   SKIPPED + "a reward is nan; .* lower --lr, from --model .*_000001 ", 1),
    "NaN loss": (in_step_2(nan_loss), SKIPPED + "the gradient norm is nan; .*--lr, from ", 1),
    "gap": (in_step_2(gap), SKIPPED + "sampler and learner disagree.*{go on}", 1),
    "no memory": (in_step_2(no_memory), SKIPPED + "too little memory to learn.*{go on}", 1),
    "full log": (in_step_2(full_log, 1), "No space left.*" + ROOM, 1),
    **{f"full disk, {name}": (in_step_2(act, save_every), "stopped: .*large.*" + ROOM, newest)
       for name, act, save_every, newest in (
           ("asked to stop", full_disk_and(stop), 1, 1),
           ("asked to stop early", full_disk_and(stop), 3, None),
           ("giving up", full_disk_and(lambda: [[NAN] * 8] * 3), 3, None))},
    "full disk": (in_step_2(full_disk, 1), "stopped: .*large.*" + ROOM, 1),
    **{f"{name} {how}": (damaged(how, name), "step_000003 is damaged and left aside\n", 2)
       for how in ("flipped", "truncated", "missing", "empty")
       for name in sorted([*run.FILES, "state.json"])},
    "two damaged": (damaged("flipped", "optimizer.safetensors", "state.json"),
                    "step_000003 is damaged .*\n.*step_000002 is damaged and left aside\n", 1),
    **{f"{step} left": (only(step), "", step or None) for step in range(4)},
    "killed in a write": (left(killed_in_a_write), "", 2),
    "old clock": (left(old_clock), "", 2),
}


@pytest.fixture
def elsewhere(monkeypatch):
    """A clock that runs backwards, and other cores."""
    clock, threads = iter(range(10**9, 0, -3600)), torch.get_num_threads()
    cores = getattr(os, "sched_getaffinity", lambda _: None)(0)
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    torch.set_num_threads(2)
    if cores:
        os.sched_setaffinity(0, {min(cores)})
    yield
    torch.set_num_threads(threads)
    if cores:
        os.sched_setaffinity(0, cores)


@pytest.mark.parametrize("name", ENDINGS)
def test_however_a_run_ends_it_says_so_and_goes_on_to_the_same_bits(
        monkeypatch, tmp_path, capsys, elsewhere, tiny, name):
    end, said, newest = ENDINGS[name]
    folder, ended, handler = tmp_path / "run", "", signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        try:
            end(folder, patch, tiny)
        except (UserError, SystemExit) as error:
            ended = f"{type(error).__name__}: {error} "
            assert "\n" not in str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, FILE_SIZES)
    if (folder / "aside").exists():
        (folder / "aside").replace(folder / "metrics.jsonl")
    found = run.newest_checkpoint(folder)
    assert (found and int(found.name[5:])) == newest
    ended += capsys.readouterr().out
    go_on = f"go on with: python train.py --resume {re.escape(str(folder))}"
    assert re.search(said.replace("{go on}", go_on), ended, re.S)
    if ended.startswith(SKIPPED):  # neither that step nor its row counts
        assert [row["step"] for row in rows(folder / "metrics.jsonl")] == [1]
        assert rows(folder / "failures.jsonl")[0]["step"] == 2
    assert name == "killed in a write" or not list(folder.glob(".*")), "half of it is left"
    folder = folder.rename(tmp_path / "moved")
    train.main(["--resume", str(folder)])
    assert state(folder) == state(tiny) and not list(folder.glob(".*"))
    assert signal.getsignal(signal.SIGINT) == handler


def test_a_4bit_run_resumes_and_is_evaluated_in_4_bits(tmp_path):
    folder = go(tmp_path / "run", "--load-in-4bit", "--gradient-checkpointing")
    unbroken = state(folder)
    shutil.rmtree(folder / "step_000003")
    train.main(["--resume", str(folder)])
    assert state(folder) == unbroken
    assert max(row["logprob_gap_max"] for row in rows(folder / "metrics.jsonl")) < 1e-4
    args = cli.parse(sample.__doc__, sample.SETTINGS, ["--model", str(folder)])
    sample.settle(args)
    assert args.load_in_4bit is True


# ---------------------------------------------------------------- 2. killed

def script(main: str, argv: list[str], grading_s: float) -> None:
    """What a process of this file does: a script, quiet, without figures, grading slowly."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    evaluate.plot = evaluate.plot_history = lambda *_: None
    grade_all = tasks.grade_all
    tasks.grade_all = lambda *args: time.sleep(grading_s) or grade_all(*args)
    if main == "evaluate":
        sample.HFSampler.block = 5  # problems at a time: many moments to be killed at
    sys.argv = [f"{main}.py", *argv]
    cli.run_script({"train": train, "evaluate": evaluate}[main].main)


def start(main: str, *argv, grading_s: float = 0):
    process = PROCESSES.Process(target=script, args=(main, list(map(str, argv)), grading_s))
    process.start()
    return process


def wait_for(what, process, seconds=120):
    end = time.monotonic() + seconds
    while not what() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.001)


def kill_until_done(begin, changed, rng, most):
    """Start a process again and again and kill it at random moments, until it is done.

    Every other time it is killed just when `changed()` says that something is being written.
    -> how often it was killed, at most `most` times.
    """
    for kills in itertools.count():
        before = changed()
        process = begin()
        if kills == most:
            process.join()
        elif kills % 2:
            wait_for(lambda: changed() != before, process)
            time.sleep(rng.uniform(0, 0.02))
        else:
            process.join(rng.uniform(0.2, 4))
        process.kill()
        process.join()
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL


no_vllm = pytest.mark.skipif(not has_cpu_vllm(), reason="no CPU build of vLLM")


@pytest.mark.parametrize("sampler", ["hf", pytest.param("vllm", marks=no_vllm)])
def test_training_killed_at_random_moments_ends_in_the_same_bits(tmp_path, sampler):
    flags, unbroken = [*SHORT, "--sampler", sampler], tmp_path / "unbroken"
    rng, kills, number = random.Random(KILLS), 0, 0
    whole = start("train", *flags, "--run", unbroken)
    whole.join()
    assert whole.exitcode == 0
    while kills < KILLS:
        folder, newest, number = tmp_path / str(number), [], number + 1

        def begin():
            found = run.newest_checkpoint(folder)
            newest.append(int(found.name[5:]) if found else -1)
            assert newest == sorted(newest), "a finished checkpoint was lost"
            again = ["--resume", folder] if folder.exists() else [*flags, "--run", folder]
            return start("train", *again)

        def being_written():
            return {(path, path.stat().st_ctime_ns)
                    for path in folder.glob(".step_*.unfinished") if path.exists()}
        kills += kill_until_done(begin, being_written, rng, KILLS - kills)
        assert state(folder) == state(unbroken)
        assert checkpoints(folder) == checkpoints(unbroken)
        assert [row["step"] for row in rows(folder / "evals.jsonl")] == [0, 5, 10, 12]


def test_evaluation_killed_at_random_moments_ends_in_the_same_bits(tmp_path):
    flags, rng, kills, number = ["--n", 16, "--limit", 200], random.Random(KILLS), 0, 0
    start("evaluate", *flags, "--out", tmp_path / "unbroken.png").join()

    def results(name):
        paths = [*sorted(tmp_path.glob(f"{name}/*")), tmp_path / f"{name}.csv"]
        return [path.read_bytes() for path in paths]
    while kills < KILLS:
        written = lambda: sum(path.stat().st_size for path in tmp_path.glob(f"{number}/*"))
        begin = lambda: start("evaluate", *flags, "--out", tmp_path / f"{number}.png")
        kills += kill_until_done(begin, written, rng, KILLS - kills)
        assert results(number) == results("unbroken")
        assert len(results(number)[0].splitlines()) == 200
        number += 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_leaves_at_once_and_loses_no_finished_checkpoint(tmp_path, tiny, number):
    folder = copy_of(tiny, tmp_path / "run")
    shutil.rmtree(folder / "step_000003")
    process = start("train", "--resume", folder, grading_s=60)
    before = (folder / "evals.jsonl").stat().st_ino
    wait_for(lambda: (folder / "evals.jsonl").stat().st_ino != before, process)  # step 3 began
    time.sleep(0.5)
    os.kill(process.pid, number)
    time.sleep(0.5)
    assert process.is_alive(), "the first one waits for the step"
    os.kill(process.pid, number)
    process.join(5)
    assert process.exitcode == -number
    assert run.newest_checkpoint(folder).name == "step_000002"
    train.main(["--resume", str(folder)])
    assert state(folder) == state(tiny)


def test_ctrl_c_before_the_first_step_is_a_sentence_and_130(capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(lambda: signal.raise_signal(signal.SIGINT))
    assert stopped.value.code == 130
    assert "nothing that was finished is lost" in capsys.readouterr().err


# ---------------------------------------------------------------- 3. what cannot go on

def no_whole_checkpoint(folder):
    for name in checkpoints(folder):
        spoil(folder / name / "optimizer.safetensors", "truncated")


def another_base(folder):
    """A model with the same names and shapes, but with other weights."""
    model = copy_of(run.TOY, folder.parent / "model")
    weights = {name: value * 1.5 for name, value in load_file(model / "model.safetensors").items()}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    change_config(lambda config: config["flags"].update(model=str(model)))(folder)


def change_config(change):
    def spoiled(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
    return spoiled


def damaged_record(name):
    return lambda folder: (folder / name).write_bytes(
        b"\0\0\0\n" + (folder / name).read_bytes())


def its_own_model(folder):
    """Directly, and by way of another run."""
    other = copy_of(folder, folder.parent / "other")
    change_config(lambda config: config["flags"].update(model=str(other)))(folder)
    change_config(lambda config: config["flags"].update(model=str(folder)))(other)


def other_data(which):
    """The digest of the data is that of others: what a changed file comes to."""
    return change_config(lambda config: config["data"].update({which: "x"}))


ANOTHER_VERSION = "run directory .* is of another version of train.py"
REFUSED = {  # name: what happened to a finished run, what --resume says
    "no whole checkpoint": (no_whole_checkpoint, "no checkpoint of .* is whole"),
    "another base": (another_base, "step_000003 was written with another base model"),
    "config no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
    "its own model": (its_own_model, "run directory .* is its own --model"),
    "no format": (change_config(lambda config: config.pop("format")), ANOTHER_VERSION),
    "next format": (change_config(lambda c: c.update(format=run.FORMAT + 1)), ANOTHER_VERSION),
    "a flag less": (change_config(lambda config: config["flags"].pop("flip")), ANOTHER_VERSION),
    "a flag more": (change_config(lambda c: c["flags"].update(keep=2)), ANOTHER_VERSION),
    **{f"other {which} data": (other_data(which), f"its {which} problems have changed since")
       for which in ("training", "held-out")},
    **{f"damaged {name}": (damaged_record(name), f"{name}, line 1: not a JSON object")
       for name in RECORDS},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_cannot_go_on_is_refused_in_one_sentence_and_kept(tmp_path, tiny, name):
    folder = copy_of(tiny, tmp_path / "run")
    happens, said = REFUSED[name]
    happens(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=said) as refused:
        train.main(["--resume", str(folder)])
    assert "\n" not in str(refused.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    if said == ANOTHER_VERSION:
        with pytest.raises(UserError, match=said):  # nor is it taken for a model
            run.resolve_model(str(folder))


def test_a_damaged_checkpoint_that_is_asked_for_is_refused(tmp_path, tiny):
    folder = copy_of(tiny, tmp_path / "run")
    spoil(folder / "step_000003" / run.WEIGHTS, "flipped")
    with pytest.raises(UserError, match="step_000003 is damaged: name its run instead"):
        run.resolve_model(str(folder / "step_000003"))


def test_checkpoints_are_sorted_by_number_and_copies_are_left_alone(tmp_path, tiny):
    for name in ("step_999999", "step_1000000", "step_9999999.bak", "step_2"):
        copy_of(tiny / "step_000003", tmp_path / name)
    assert run.newest_checkpoint(tmp_path).name == "step_1000000"


def test_a_checkpoint_is_on_the_disk_before_its_name_counts(monkeypatch, tmp_path):
    flushed, flush, rename, counted = [], run.flush, Path.rename, []

    def noted(path, target):
        if target.name.startswith("step_"):
            expected = {path.name, *(file.name for file in path.iterdir()), *RECORDS}
            assert expected <= set(flushed)
            counted.append(target.name)
            flushed.clear()
        return rename(path, target)
    monkeypatch.setattr(run, "flush", lambda path: flushed.append(path.name) or flush(path))
    monkeypatch.setattr(Path, "rename", noted)
    go(tmp_path / "run")
    assert len(counted) == 3 and flushed == ["run"]


def test_a_read_only_run_directory_is_a_sentence(tiny):
    place = Path(tempfile.mkdtemp())
    folder = copy_of(tiny, place / "run")
    paths = [place, *place.rglob("*")]
    try:
        for path in paths:
            path.chmod(0o555)
        if os.geteuid() == 0:  # to whom nothing is read-only
            os.seteuid(65534)
        with pytest.raises(UserError, match="Permission denied.*; make room, or make it writable"):
            train.main(["--resume", str(folder)])
        with pytest.raises(PermissionError, match=str(place)):
            go(place / "new")
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        for path in paths:
            path.chmod(0o755)
        shutil.rmtree(place)


def test_a_run_directory_appears_with_its_config_or_not_at_all(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "rename", full)
        go(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    go(tmp_path / "run", "--steps", 1)  # and the name is free


# ---------------------------------------------------------------- 4. numbers

def spoil_an_answer(monkeypatch, bad):
    """Make a right answer of the first batch bad. -> a list that will hold it."""
    chosen, original = [], policy.token_logprobs

    def spoil(rewards, groups):
        group, i = next((p, i) for p in range(3) for i in range(8) if rewards[p][i])
        rollout = groups[group][i]
        if bad == "sampler":
            groups[group][i] = replace(rollout, logprobs=(-INF, *rollout.logprobs[1:]))
        elif bad != "gradient":
            rewards[group][i] = float(bad)
        chosen.append(rollout)

    def token_logprobs(model, rollouts, temperature):
        logprobs, owners = original(model, rollouts, temperature)
        mine = torch.tensor([rollouts[owner] is chosen[0] for owner in owners])
        if bad == "gradient" and logprobs.requires_grad:
            logprobs.register_hook(lambda gradient: gradient.masked_fill(mine, INF))
        return logprobs, owners
    on_batch(monkeypatch, 1, spoil)
    monkeypatch.setattr(policy, "token_logprobs", token_logprobs)
    return chosen


@pytest.mark.parametrize("bad, said", [
    ("nan", "a reward is nan"), ("inf", "a reward is inf"), ("-inf", "a reward is -inf"),
    ("gradient", "the gradient norm is (nan|inf)"), ("sampler", "")])
def test_a_step_with_a_bad_number_is_not_applied_and_the_answer_to_blame_is_written_down(
        monkeypatch, tmp_path, bad, said):
    folder, chosen = tmp_path / "run", spoil_an_answer(monkeypatch, bad)
    with pytest.raises(UserError, match=f"step 1 was not applied: {said}"):
        go(folder, "--objective", "maxk")
    saved = load_file(folder / "step_000000" / run.WEIGHTS)
    assert not any(value.any() for name, value in saved.items() if "lora_B" in name)
    [row], [rollout] = rows(folder / "failures.jsonl"), chosen
    if said:  # and its problem
        assert row["completion_ids"] == list(rollout.completion_ids)
        assert (row["text"], row["logprobs"]) == (rollout.text, list(rollout.logprobs))
        [problem] = [p for p in tasks.load_problems("divisor") if p.id == row["id"]]
        asked = TOKENIZER.decode(rollout.prompt_ids)
        assert row["question"] == problem.question == asked


@pytest.mark.parametrize("save_every", [3, 1])
def test_a_policy_that_blew_up_ends_in_a_sentence_and_is_not_saved(
        monkeypatch, tmp_path, save_every):
    monkeypatch.setitem(cli.SETTINGS, "lr", cli.SETTINGS["lr"]._replace(most=1e40))
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="the policy's probabilities are NaN.*lower --lr"):
        go(folder, "--lr", 1e30, "--save-every", save_every)
    for checkpoint in checkpoints(folder):
        weights = load_file(folder / checkpoint / run.WEIGHTS).values()
        assert all(value.abs().max() < 1e3 for value in weights)


# ---------------------------------------------------------------- 5. nobody in

FORBIDDEN = (r"\bpickle\b|(?<![.\w])(eval|exec)\(|torch\.(load|save)\(|trust_remote_code=True"
             r"|shell=True|os\.system")


def test_the_sources_use_no_pickle_no_eval_and_no_remote_code():
    sources = [*ROOT.glob("*.py"), *ROOT.glob("lib/*.py")]
    assert len(sources) >= 10
    for path in sources:
        code = re.sub(r'""".*?"""|#.*', "", path.read_text(), flags=re.S)
        assert not re.search(FORBIDDEN, code), path


@pytest.mark.parametrize("kind", ["qwen2", "its-own"])
def test_code_that_a_model_folder_brings_is_not_run(tmp_path, kind):
    model, mark = Path(save_model("qwen2", tmp_path / "model")), tmp_path / "it ran"
    (model / "own.py").write_text(
        f"open({str(mark)!r}, 'w')\n"
        "from transformers import Qwen2Config as C, Qwen2ForCausalLM as M\n")
    for name in ("config.json", "tokenizer_config.json"):
        config = json.loads((model / name).read_text())
        config["auto_map"] = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M",
                              "AutoTokenizer": ["own.T", None]}
        config["model_type"] = kind
        (model / name).write_text(json.dumps(config))
    try:
        policy.load_model(str(model))
    except UserError:
        assert kind == "its-own"
    assert not mark.exists()


@pytest.mark.parametrize("text", [
    "", "{", "[]", '{"r": 8}', '{"base_model_name_or_path": null, "r": 8, "lora_alpha": 8}',
    '{"base_model_name_or_path": "toy", "r": "8", "lora_alpha": 8}', "[" * 10**5, "pickle"])
def test_an_adapter_in_a_pickle_or_with_a_broken_config_is_refused_in_one_sentence(
        tmp_path, tiny, text):
    adapter = copy_of(tiny / "step_000003", tmp_path / "adapter")
    (adapter / "state.json").unlink()  # no checkpoint: nothing says what its files must be
    if text == "pickle":
        torch.save(load_file(adapter / run.WEIGHTS), adapter / "adapter_model.bin")
        (adapter / run.WEIGHTS).unlink()
    else:
        (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=str(adapter)) as refused:
        run.resolve_model(str(adapter))
    assert "\n" not in str(refused.value)
    assert text != "pickle" or f"no {run.WEIGHTS}, the only form" in str(refused.value)


@pytest.mark.parametrize("eos", [1, None])
def test_a_model_without_an_end_token_is_refused_and_one_without_a_pad_token_works(tmp_path, eos):
    model = tf.AutoModelForCausalLM.from_pretrained(run.TOY)
    tokenizer = tf.AutoTokenizer.from_pretrained(run.TOY)
    tokenizer.pad_token = tokenizer.eos_token = None
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.eos_token_id = None, eos
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--model", tmp_path / "model", "--steps", 1, *GAME]
    if eos:
        [row] = rows(go(tmp_path / "run", *flags) / "metrics.jsonl")
        assert row["truncated"] < 0.5 and row["logprob_gap_max"] < 1e-4
    else:
        refused_unwritten(tmp_path / "run", flags, "name an end token")


def test_an_architecture_that_peft_refuses_is_one_sentence_and_nothing_is_written(tmp_path):
    flags = ["--model", save_model("mamba", tmp_path / "mamba"), *GAME]
    refused_unwritten(tmp_path / "run", flags, "PEFT puts no adapter on .* of mamba models")


def refused_unwritten(folder, flags, said):
    with pytest.raises(UserError, match=said) as refused:
        go(folder, *flags)
    assert "\n" not in str(refused.value) and not folder.exists()


# ---------------------------------------------------------------- 6. nothing left behind

def test_out_of_memory_halves_the_micro_batch_for_good_with_the_gradient_of_the_half(
        monkeypatch, tmp_path, capsys):
    flags = ["--objective", "grpo", "--n", 32, "--micro-batch-tokens"]  # all have a weight
    halved, original = go(tmp_path / "halved", *flags, 32), policy.token_logprobs

    def limited(model, rollouts, temperature):
        needed = len(rollouts) * max(map(policy.length, rollouts))
        if torch.is_grad_enabled() and needed > 40:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")
        return original(model, rollouts, temperature)
    monkeypatch.setattr(policy, "token_logprobs", limited)
    capsys.readouterr()
    folder = go(tmp_path / "run", *flags, 130)
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert [int(re.search(r"tokens is (\d+)", line)[1]) for line in said] == [65, 32]
    assert state(folder) == state(halved)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")
def test_a_run_leaves_no_descriptor_and_no_process_behind(tmp_path):
    def count():
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        return len(os.listdir("/proc/self/fd")), children
    go(tmp_path / "first", "--steps", 1)
    before = count()
    for name in ("a", "b", "c"):
        go(tmp_path / name, "--steps", 1)
    assert count() == before


def test_a_worker_that_hangs_ends_without_its_parent():
    worker = subprocess.Popen([sys.executable, "-P", marker.__file__], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdout.readline() == "ready\n"
    hangs = [r"\boxed{(((9^{9999})^{9999})^{9999})\pi}", r"\pi", 1.0]  # and the limit
    worker.stdin.write(json.dumps(hangs) + "\n")
    worker.stdin.close()  # all that is left of a parent that was killed
    assert worker.wait(100) == -signal.SIGPROF


def test_a_second_process_on_a_run_is_refused_before_anything_is_loaded(monkeypatch, tmp_path):
    folder, refused = tmp_path / "run", []

    def intrude(*_):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with monkeypatch.context() as patch:
            patch.setattr(policy, "load_model", lambda *_, **__: pytest.fail("too late"))
            refused.append(pytest.raises(UserError, train.main, ["--resume", str(folder)]))
        assert all(path.read_bytes() == data for path, data in before.items())
    on_batch(monkeypatch, 2, intrude)
    go(folder)
    assert "is in use by another train.py" in str(refused[0].value)
    run.lock(folder / "config.json", "it still holds the directory").close()
