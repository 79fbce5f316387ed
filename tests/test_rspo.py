"""Proof that the closed forms of rspo.py are what they claim to be.

1. Small n: equal to the definitions, by listing every subset (ties, negative, graded, 0/1).
2. Large n: equal to exact rational arithmetic, up to n = 4096, where binomials overflow.
3. Symmetries, shapes and dtypes; k = 1 is the plain policy gradient, bit for bit.
4. The exact relations to PKPO, Pass@k Training, verl's grpo_passk, GRPO, MaxRL and TailRL, and
   k = "harmonic", the sum that is the last two.
5. The loss is the gradient convention and nothing more; bad input is refused in a sentence.
"""

import doctest
import warnings
from fractions import Fraction
from functools import partial
from itertools import combinations, product
from math import comb

import pytest
import torch

import rspo

METRICS = [rspo.pass_at_k, rspo.max_at_k]
BINARY = [rspo.pass_at_k, rspo.pass_at_k_weights, rspo.plug_in_weights]
WEIGHTS = list(rspo.OBJECTIVES.values())
UNORDERED = [fn for fn in METRICS + WEIGHTS if fn is not rspo.group_max_weights]
N_K = [(n, k) for n in range(1, 9) for k in range(1, n + 1)]
pytestmark = pytest.mark.filterwarnings("ignore:n = .* < 2k")


def close(got, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def mean(values):
    return sum(values := list(values)) / len(values)


def binary_groups(n):
    """(n + 1, n): one group for every number c = 0..n of right answers, shuffled."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    return (torch.arange(n) < torch.arange(n + 1)[:, None])[:, order].double()


def groups(n):
    """(G, n): 0/1, heavy ties, graded of both signs, all negative, all equal."""
    g = torch.Generator().manual_seed(n)
    graded = 3 * torch.randn(3, n, generator=g).double()
    ties = torch.randint(-2, 3, (3, n), generator=g)
    equal = torch.full((1, n), -1.5)
    return torch.cat([binary_groups(n), ties, graded, -graded[:1].abs(), equal])


def test_the_objectives_are_named():
    assert {name: fn.__name__ for name, fn in rspo.OBJECTIVES.items()} == {
        "passk": "pass_at_k_weights", "maxk": "max_at_k_weights",
        "loo": "leave_one_out_weights", "groupmax": "group_max_weights",
        "plugin": "plug_in_weights", "centred": "centred_weights", "grpo": "grpo_weights",
        "reward": "reward_weights"}


# ---------------------------------------------------------------- 1. the definitions

def by_definition(r, k):
    """k * mean over (k-1)-subsets S of the others of max(r_i - max_S r, 0); for k = 1, r_i."""
    if k == 1:
        return r
    return [k * mean(max(r[i] - max(S), 0 * r[i]) for S in combinations(r[:i] + r[i + 1:], k - 1))
            for i in range(len(r))]


def leave_one_out_by_definition(r, k):
    """W_i minus the mean of the weights that the other n - 1 samples have among themselves."""
    return [w - mean(by_definition(r[:i] + r[i + 1:], k))
            for i, w in enumerate(by_definition(r, k))]


def group_max_by_definition(r, k):
    return [k * max(r[i - i % k:i - i % k + k]) for i in range(len(r))]


@pytest.mark.parametrize("n, k", N_K)
def test_everything_equals_enumeration_of_all_subsets(n, k):
    r, rows = groups(n), groups(n).tolist()
    close(rspo.max_at_k(r, k), [mean(map(max, combinations(row, k))) for row in rows])
    close(rspo.max_at_k_weights(r, k), [by_definition(row, k) for row in rows])
    if k < n:
        expected = [leave_one_out_by_definition(row, k) for row in rows]
        close(rspo.leave_one_out_weights(r, k), expected)
    if n % k == 0:
        close(rspo.group_max_weights(r, k), [group_max_by_definition(row, k) for row in rows])
    r, rows = binary_groups(n), binary_groups(n).tolist()  # Pass@k and Max@k are the same
    close(rspo.pass_at_k(r, k), [mean(map(any, combinations(row, k))) for row in rows])
    close(rspo.pass_at_k_weights(r, k), [by_definition(row, k) for row in rows])
    close(rspo.pass_at_k(r, k), rspo.max_at_k(r, k))
    close(rspo.pass_at_k_weights(r, k), rspo.max_at_k_weights(r, k))


@pytest.mark.parametrize("n, k", [(n, k) for n, k in N_K if n ** k < 2000])
def test_the_plug_in_draws_its_rivals_with_replacement_and_from_all(n, k):
    for row in binary_groups(n).tolist():
        all_wrong = mean(not any(S) for S in product(row, repeat=k - 1))
        close(rspo.plug_in_weights(row, k), [k * all_wrong * r for r in row])


@pytest.mark.parametrize("n, k", N_K)
def test_grpo_and_the_reward_do_not_know_k(n, k):
    r = groups(n)
    assert torch.equal(rspo.reward_weights(r, k), r)
    centred = r - r.mean(-1, keepdim=True)
    spread = r.std(-1, keepdim=True) if n > 1 else torch.ones(len(r), 1)
    close(rspo.grpo_weights(r, k), torch.where(centred == 0, 0, centred / spread))  # no NaN


def test_the_worked_examples_in_the_docstrings():
    assert doctest.testmod(rspo) == (0, 2)  # none of two fails


# ---------------------------------------------------------------- 2. exact rationals, large n

def exact(levels, k):
    """Rewards as {value: count} -> exact Max@k and {value: weight}, by a maximum's law."""
    n = sum(levels.values())
    upto = {v: sum(levels[u] for u in levels if u <= v) for v in levels}

    def chance(u, m, size):  # that u is the maximum of `size` of m
        return Fraction(comb(upto[u], size) - comb(upto[u] - levels[u], size), comb(m, size))

    weights = {v: v if k == 1 else k * sum(
        (v - u) * chance(u, n - 1, k - 1) for u in levels if u < v) for v in levels}
    return sum(u * chance(u, n, k) for u in levels), weights


def exact_leave_one_out(levels, k, v):
    others = {u: count - (u == v) for u, count in levels.items() if count > (u == v)}
    weights = exact(others, k)[1]
    baseline = sum(others[u] * weights[u] for u in others) / sum(others.values())
    return exact(levels, k)[1][v] - baseline


def assert_exact(got, truth):
    """1e-9 relative; below 1e-300 float64 may fade to 0."""
    error = abs(Fraction(got.item()) - truth)
    assert error <= abs(truth) / 10**9 + Fraction(1, 10**300), (got.item(), float(truth))


@pytest.mark.parametrize("n, k", [(64, 8), (67, 33), (1024, 512), (1030, 515), (4096, 1),
                                  (4096, 2048), (4096, 4095), (4096, 4096)])
def test_large_n_equals_exact_rationals(n, k):
    values = torch.tensor([-1.5, -0.3, 0.1, 0.7, 2.0], dtype=torch.float64)
    counts = [n - 11, 5, 3, 2, 1]
    r = values.repeat_interleave(torch.tensor(counts))
    levels = dict(zip(map(Fraction, values.tolist()), counts))
    assert_exact(rspo.max_at_k(r, k), exact(levels, k)[0])
    for v, weight in exact(levels, k)[1].items():
        assert_exact(rspo.max_at_k_weights(r, k)[r == float(v)][0], weight)
        if k < n:
            found = rspo.leave_one_out_weights(r, k)[r == float(v)][0]
            assert_exact(found, exact_leave_one_out(levels, k, v))
    for c in {1, n // 64, n // 4, n, n - k + 1}:  # n - k + 1: the last c with any signal
        r = torch.arange(n) < c
        assert_exact(rspo.pass_at_k(r, k), 1 - Fraction(comb(n - c, k), comb(n, k)))
        for fn in (rspo.pass_at_k_weights, rspo.max_at_k_weights):
            truth = Fraction(k * comb(n - c, k - 1), comb(n - 1, k - 1))
            assert_exact(fn(r, k)[0], truth)
            assert (fn(r, k)[c:] == 0).all()


# ---------------------------------------------------------------- 3. symmetries, dtypes, k = 1

@pytest.mark.parametrize("fn", UNORDERED)
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_permutation_equivariance(fn, k):
    r, order = (binary_groups(7) if fn in BINARY else groups(7)), [3, 0, 6, 2, 5, 1, 4]
    close(fn(r[:, order], k), fn(r, k) if fn in METRICS else fn(r, k)[:, order])


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_shift_and_scale(k):
    r = groups(12)
    for fn in (rspo.max_at_k, rspo.max_at_k_weights, rspo.leave_one_out_weights,
               rspo.group_max_weights):
        assert torch.equal(fn(4 * r, k), 4 * fn(r, k))  # a power of two rounds nothing
    close(rspo.max_at_k(r + 5, k), rspo.max_at_k(r, k) + 5)
    close(rspo.leave_one_out_weights(r + 5, k), rspo.leave_one_out_weights(r, k))
    close(rspo.max_at_k_weights(r + 5, k), rspo.max_at_k_weights(r, k) + (5 if k == 1 else 0))
    close(rspo.grpo_weights(4 * r + 5, k), rspo.grpo_weights(r, k))


@pytest.mark.parametrize("fn", METRICS + WEIGHTS)
def test_leading_dimensions_dtypes_and_an_untouched_input(fn):
    r = binary_groups(6)[1:].view(2, 3, 6)
    before, result = r.clone(), fn(r, 2)
    assert torch.equal(r, before)
    assert result.dtype == torch.float64
    assert result.shape == (r.shape[:-1] if fn in METRICS else r.shape)
    assert torch.equal(result, torch.stack([fn(group, 2) for group in r]))
    assert torch.equal(result[1], torch.stack([fn(row, 2) for row in r[1]]))
    for dtype in (torch.bool, torch.int64, torch.float32, torch.bfloat16):
        assert torch.equal(fn(r.to(dtype), 2), result)
        assert torch.equal(fn(r.to(dtype).tolist(), 2), result)
    assert not fn(r.requires_grad_(), 2).requires_grad


def test_k_1_is_the_plain_policy_gradient_bit_for_bit():
    r = 10 * torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) - 3  # float32
    assert torch.equal(rspo.max_at_k_weights(r, 1), r.double())
    assert torch.equal(rspo.group_max_weights(r, 1), r.double())
    assert torch.equal(rspo.pass_at_k_weights(r > 0, 1), (r > 0).double())
    assert torch.equal(rspo.plug_in_weights(r > 0, 1), (r > 0).double())
    others = (r.double().sum(-1, keepdim=True) - r.double()) / 15
    close(rspo.leave_one_out_weights(r, 1), r.double() - others)  # RLOO
    close(rspo.centred_weights(r, 1), r.double() - others)


# ---------------------------------------------------------------- 4. relations to the neighbours

@pytest.mark.parametrize("n, k", [(n, k) for n, k in N_K if k >= 2])
def test_rspo_is_n_times_pkpo_loo_minus_one(n, k):
    def pkpo(r, i):  # over teams with i: its maximum, with i less without
        teams = (team for team in combinations(range(n), k) if i in team)
        return sum(max(r[j] for j in team) - max(r[j] for j in team if j != i)
                   for team in teams) / comb(n, k)
    expected = [[pkpo(r, i) for i in range(n)] for r in groups(n).tolist()]
    close(rspo.max_at_k_weights(groups(n), k) / n, expected)


@pytest.mark.parametrize("n, k", [(n, k) for n, k in N_K if k < n])
def test_leave_one_out_is_pass_at_k_training_without_its_std(n, k):
    for c, r in enumerate(binary_groups(n)):  # arXiv 2508.10751, before the division
        failed = comb(n - c, k) / comb(n, k)  # 1 - the mean reward of a team of k
        all_wrong = comb(n - c - 1, k - 1) / comb(n - 1, k - 1) if c < n else 0  # given one is
        advantage = failed * r + (failed - all_wrong) * (1 - r)
        close(rspo.leave_one_out_weights(r, k), n * k / (n - k) * advantage)


@pytest.mark.parametrize("n", range(2, 9))
def test_k_equal_n_is_verls_grpo_passk_times_n(n):
    top, best = groups(n).topk(2)  # best minus second best, for the best alone
    verl = torch.zeros_like(groups(n)).scatter(-1, best[:, :1], top[:, :1] - top[:, 1:])
    close(rspo.max_at_k_weights(groups(n), n) / n, verl)


def tail_rl(r):
    """arXiv 2609.02987: each gap between sorted rewards, from 0 up, goes to those at or above it.

    n * sum_{j<=i} (r_(j) - r_(j-1)) / (n - j + 1): n - j + 1 answers survive the j-th gap.
    """
    gaps = {level: Fraction(level - lower) / sum(x >= level for x in r)
            for lower, level in zip([0] + sorted(set(r)), sorted(set(r)))}
    return [len(r) * sum(gap for level, gap in gaps.items() if level <= x) for x in r]


@pytest.mark.parametrize("n", range(1, 8))
def test_harmonic_is_maxrl_and_tailrl_and_the_sum_over_k_in_exact_rationals(n):
    for row in (4 * groups(n)).round().int().tolist():  # ties, both signs
        exact_row = [Fraction(x, 4) for x in row]
        by_k = [by_definition(exact_row, k) for k in range(1, n + 1)]
        total = [sum(w / k for k, w in enumerate(each, 1)) for each in zip(*by_k)]
        assert total == tail_rl(exact_row)
        if set(row) <= {0, 4} and 4 in row:
            assert total == [Fraction(n, row.count(4)) * x for x in exact_row]  # MaxRL
        close(rspo.max_at_k_weights(list(map(float, exact_row)), "harmonic"),
              list(map(float, total)))
    r = binary_groups(n)
    right = r.sum(-1, keepdim=True)
    expected = torch.where(right > 0, n / right * r, 0)
    close(rspo.pass_at_k_weights(r, "harmonic"), expected)
    close(rspo.max_at_k_weights(r, "harmonic"), expected)


@pytest.mark.parametrize("n", range(2, 9))
def test_harmonic_minus_its_mean_is_the_leave_one_out_sum_up_to_n_minus_1(n):
    weights = rspo.max_at_k_weights(groups(n), "harmonic")
    total = sum(rspo.leave_one_out_weights(groups(n), k) / k for k in range(1, n))
    close(weights - weights.mean(-1, keepdim=True), total)
    for row in (4 * groups(n)[-5:]).round().int().tolist():
        row = [Fraction(x, 4) for x in row]
        centred = [w - mean(tail_rl(row)) for w in tail_rl(row)]
        by_k = [leave_one_out_by_definition(row, k) for k in range(1, n)]
        assert centred == [sum(w / k for k, w in enumerate(each, 1)) for each in zip(*by_k)]


def test_harmonic_of_many_samples():
    r = torch.arange(4096) < 3
    close(rspo.pass_at_k_weights(r, "harmonic")[:4], [4096 / 3] * 3 + [0])


@pytest.mark.parametrize("fn", METRICS + WEIGHTS[2:])
def test_harmonic_is_refused_by_all_others(fn):
    with pytest.raises(ValueError, match="k is 'harmonic', .* whole number with 1 <= k <= n = 4"):
        fn([0, 1, 0, 1], "harmonic")


@pytest.mark.parametrize("n, k", N_K)
def test_centred_is_pkpo_in_the_code_of_maxrl_times_k(n, k):
    for row in binary_groups(n).tolist():
        c = int(sum(row))
        w = [comb(n - c, k - 1) / comb(n - 1, k - 1) * r for r in row]
        expected = [k * (n * x - sum(w)) / max(n - 1, 1) for x in w]
        close(rspo.centred_weights(row, k), expected)


@pytest.mark.parametrize("n, k", N_K[1:])
def test_where_there_is_signal_and_how_normalising_loses_k(n, k):
    r = binary_groups(n)  # row c has c right answers
    weights = rspo.pass_at_k_weights(r, k)
    signal = weights.any(-1)
    assert signal.tolist() == [1 <= c <= n - k + 1 for c in range(n + 1)]
    mixed = signal & (torch.arange(n + 1) < n)
    normalise = partial(rspo.grpo_weights, k=1)
    close(normalise(weights[mixed]), normalise(r[mixed]))  # plain GRPO, whatever k


@pytest.mark.parametrize("k, levels", [(8, [8, 0, 0, 0, 0, 0, 0, 0]),
                                       (4, [4, 16/7, 8/7, 16/35, 4/35, 0, 0, 0])])
def test_n_of_twice_k_buys_levels(k, levels):
    close(rspo.pass_at_k_weights(binary_groups(8)[1:], k).amax(-1), levels)


# ---------------------------------------------------------------- 5. the loss, and bad input

def test_the_loss_is_the_gradient_convention():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=g).double().requires_grad_()  # 6 tokens of 3 samples
    weights = torch.randn(6, generator=g).double().requires_grad_()
    chosen = torch.tensor([0, 4, 2, 2, 1, 3])
    logprobs = logits.log_softmax(-1)[range(6), chosen]
    loss = rspo.policy_gradient_loss(logprobs, weights, num_samples=3)
    parts = [rspo.policy_gradient_loss(logprobs[s], weights[s], 3)
             for s in (slice(0, 0), slice(0, 1), slice(1, 6))]
    close(loss, -sum(weights * logprobs) / 3)
    close(sum(parts), loss)  # an empty part is 0, not NaN
    loss.backward()
    close(logits.grad, -weights[:, None] * (torch.eye(5)[chosen] - logits.softmax(-1)) / 3)
    assert weights.grad is None


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("fn", METRICS + WEIGHTS)
@pytest.mark.parametrize("rewards, k, said", [
    ([1, 0], 0, r"k is 0, .* 1 <= k <= n = 2"),
    ([1, 0], -1, r"k is -1, .* 1 <= k <= n = 2"),
    ([1, 0], 3, r"k is 3, .* 1 <= k <= n = 2"),
    ([1, 0], 2.0, r"k is 2\.0, .* whole number with 1 <= k <= n = 2"),
    ([1, 0], True, r"k is True, .* whole number"),
    ([1, NAN], 1, r"rewards hold nan, .* finite"),
    ([1, INF], 1, r"rewards hold inf, .* finite"),
    ([1, -INF], 1, r"rewards hold -inf, .* finite"),
    ([INF, -INF], 1, r"rewards hold inf, .* finite"),
    (1, 1, r"rewards is .* shape \(\), .* n >= 1"),
    ([], 1, r"rewards is .* shape \(0,\), .* n >= 1"),
    ([[], []], 1, r"rewards is .* shape \(2, 0\), .* n >= 1"),
    ([1j, 0], 1, r"rewards is .* be real"),
])
def test_bad_input_is_refused_by_name_value_and_range(fn, rewards, k, said):
    with pytest.raises(ValueError, match=said):
        fn(rewards, k)


@pytest.mark.parametrize("fn, rewards, k, said", [
    *[(fn, [1, bad], 1, f"rewards hold {bad}, .* needs 0 or 1")
      for fn in BINARY for bad in (0.5, -1., 2.)],
    (rspo.group_max_weights, [0] * 5, 2, "n is 5, .* divisible by k = 2"),
    (rspo.leave_one_out_weights, [0] * 4, 4, r"k is 4, .* k <= n - 1, and n is 4"),
])
def test_what_only_some_functions_refuse(fn, rewards, k, said):
    with pytest.raises(ValueError, match=said):
        fn(rewards, k)


@pytest.mark.parametrize("fn", WEIGHTS[:3])
def test_fewer_than_2k_samples_warn_once_and_2k_do_not(fn):
    with pytest.warns(UserWarning, match=r"n = 7 < 2k = 8: .* n >= 8 is better") as caught:
        fn(torch.zeros(2, 7), 4)
    assert [w.filename for w in caught] == [__file__]  # one, and it points at the caller
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fn(torch.zeros(2, 8), 4)
        fn(torch.zeros(2, 2), 1)
        rspo.max_at_k_weights([3.0], 1)  # k = 1 is the reward itself: n hardly matters
        rspo.max_at_k(torch.zeros(7), 4)  # a metric has no levels
        rspo.pass_at_k(torch.zeros(7), 4)
