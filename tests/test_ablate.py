"""ablate.py: the intervals by simulation and by hand, the gradient's noise by plain autograd, and a grid that survives."""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import ablate
import policy
import rspo
import sample
import tasks

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--steps", "2", "--prompts", "2", "--n", "4", "--limit", "204", "--eval-n", "4", "--seeds", "1"]


def run(*flags, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "ablate.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True, **options)


def open_grid(folder, *flags, quick=False, seeds=None):
    return ablate.open_grid(argparse.Namespace(quick=quick, seeds=seeds, out=folder), list(flags))


def test_the_interval_by_hand():
    values = torch.tensor([[1., 3.], [5., 3.]], dtype=torch.float64)[..., None]        # (S, M, 1) means 2, 4 and 3, 3
    mean, half = ablate.interval(values)
    assert mean.item() == 3
    assert half.item() == pytest.approx(12.71 * (2 / 2) ** 0.5)                         # variance of the seed means 2; of the problem means 0
    mean, half = ablate.interval(values[:1])
    assert (mean.item(), half.item()) == (2, pytest.approx(12.71 * (2 / 2) ** 0.5))     # one seed: over its two problems


@pytest.mark.parametrize("of_seeds, of_problems", [(0.3, 1.0), (1.0, 0.3), (0.0, 0.0)])
def test_the_interval_covers_the_truth_over_new_seeds_and_new_problems(of_seeds, of_problems):
    torch.manual_seed(0)
    covered, trials = 0, 2000
    for _ in range(trials):
        values = of_seeds * torch.randn(5, 1, 1) + of_problems * torch.randn(1, 40, 1) + torch.randn(5, 40, 1)
        mean, half = ablate.interval(values.double())
        covered += (mean.abs() <= half).item()
    assert 0.94 <= covered / trials <= 0.999


def test_paired_differences_use_the_seeds_that_both_settings_have():
    a = ablate.Result({1: torch.ones(3, 1), 2: torch.full((3, 1), 9.0)}, {}, (1,))
    b = ablate.Result({1: torch.zeros(3, 1), 3: torch.full((3, 1), 5.0)}, {}, (1,))
    mean, half = ablate.paired(a, b)
    assert (mean.item(), half.item()) == (1, 0)
    assert "higher" in ablate.verdict({"a": a, "b": b}, "a", "b", 1) and "lower" in ablate.verdict({"a": a, "b": b}, "b", "a", 1)
    assert "do not separate" in ablate.verdict({"a": a, "b": a}, "a", "b", 1)
    assert "c failed" in ablate.verdict({"a": a}, "a", "c", 1)


def test_flipped_rewards_are_flipped_at_the_stated_rate_and_always_the_same():
    rewards = (torch.rand(400, 50, generator=torch.Generator().manual_seed(0)) < 0.3).double()
    seen = ablate.flipped(ablate.reward_weights, 0.1)(rewards, 1)
    assert (seen != rewards).double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert (seen != rewards)[rewards == 1].double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(seen, ablate.flipped(ablate.reward_weights, 0.1)(rewards, 1))
    assert torch.equal(ablate.flipped(rspo.pass_at_k_weights, 0.1)(rewards, 4), rspo.pass_at_k_weights(seen, 4))


def test_the_gradient_of_each_prompt_is_that_of_plain_autograd(tmp_path):
    grid = open_grid(tmp_path / "grid", "--limit", "204", quick=True)
    found = ablate.gradient_noise(grid, {"RSPO": (rspo.pass_at_k_weights, 2), "none": (lambda rewards, k: 0 * rewards, 2)}, prompts=4)
    model, tokenizer = policy.load_model("toy")
    model = policy.add_lora(model, 8, 32, 20)
    problems = tasks.load_problems("countdown:train")[:4]
    prompts = sample.encode_prompts(problems, tokenizer, 10**9, 12)
    groups = list(sample.sample_problems(sample.HFSampler(model, tokenizer), prompts, 16, 1.0, 12, 0, ""))
    gradients = []
    for problem, group in zip(problems, groups):
        rewards = torch.tensor([tasks.grade_countdown(r.text, problem.answer) * r.finished for r in group])
        loss = 0.0
        for rollout, weight in zip(group, rspo.pass_at_k_weights(rewards, 2).tolist()):
            ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
            logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            loss = loss - weight / 16 * logprobs[len(rollout.prompt_ids) - 1:].sum()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.trainable(model).values())]))
    gradients = torch.stack(gradients)                                                  # (P, D)
    assert gradients.abs().max() > 1e-3
    torch.testing.assert_close(found["RSPO"][0], gradients.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["RSPO"][1], gradients.double().square().sum(-1), rtol=1e-4, atol=1e-8)
    assert not found["none"][1].any()


def test_signal_to_noise_and_variance_ratio_of_known_gaussians():
    torch.manual_seed(0)
    truth = torch.full((50,), 0.2)                                                      # squared length 2, variance 50 and 200
    noises = []
    for scale in (1.0, 2.0):
        gradients = truth + scale * torch.randn(4000, 50)
        noises.append((gradients.mean(0), gradients.double().square().sum(-1)))
    assert ablate.signal_to_noise(noises[0], 32) == pytest.approx(32 * 2 / 50, rel=0.1)
    assert ablate.signal_to_noise(noises[1], 32) == pytest.approx(32 * 2 / 200, rel=0.15)
    ratio, half = ablate.variance_ratio(noises[1], noises[0])
    assert abs(ratio - 202 / 52) < 2 * half < 0.2


def test_a_killed_grid_goes_on_and_a_failed_cell_harms_no_other(tmp_path):
    """n = 4, so the setting k = 8 cannot run: it is shown as failed with its reason. SIGKILL at the first finished cell."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    process = subprocess.Popen([sys.executable, "ablate.py", "entropy", *TINY, "--out", str(broken)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (broken / "cells.jsonl").exists() or not (broken / "cells.jsonl").read_text():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (broken / "cells.jsonl").open("a") as file:
        file.write('{"cell": "half a li')
    results = {folder: run("entropy", *TINY, "--out", folder) for folder in (broken, whole)}
    for folder, result in results.items():
        assert result.returncode == 0, result.stderr
        assert "RSPO k = 8: failed, seed 31: ablate.py: --k is 8, but every k must lie in 1..n, and --n is 4" in result.stdout
        assert "| RSPO k = 4 |" in result.stdout and (folder / "entropy.png").stat().st_size > 10_000
    names = {folder: [json.loads(line)["cell"] for line in (folder / "cells.jsonl").read_text().splitlines()] for folder in results}
    assert set(names[broken]) == set(names[whole]) and len(names[whole]) == 4
    for name in names[whole]:
        if "k-8" not in name:
            assert (broken / "cells" / name / "evals.jsonl").read_bytes() == (whole / "cells" / name / "evals.jsonl").read_bytes()
    assert names[broken].count(names[broken][0]) == 1                                   # what was finished is not run again

    with pytest.raises(tasks.UserError, match=f"the grid in {whole} was made with --prompts 2, not 3: give another --out"):
        open_grid(whole, *TINY[:-2], "--prompts", "3", seeds=1)


@pytest.mark.parametrize("flags, sentence", [
    (["alignmnt"], "experiment 'alignmnt' is unknown, did you mean 'alignment'?; give one of sanity, alignment, hitchhiking"),
    (["noise", "--k", "4"], "--k is what the experiments vary; leave it out"),
    (["noise", "--limit", "100"], "--limit is 100, but must be at least 202: an interval needs two held-out problems, and the first 200"),
    (["noise", "--seeds", "0"], "--seeds is 0, but must be at least 1"),
    (["noise", "--stps", "3"], "flag --stps is unknown, did you mean '--steps'?"),
])
def test_bad_input_ends_in_one_sentence(tmp_path, monkeypatch, flags, sentence):
    monkeypatch.setattr(sys, "argv", ["ablate.py", *flags, "--out", str(tmp_path / "grid")])
    with pytest.raises(tasks.UserError, match=None) as error:
        ablate.main()
    assert sentence in str(error.value)
    assert not (tmp_path / "grid" / "cells.jsonl").exists()
