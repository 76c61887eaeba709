"""Distances against slow formulas written out, and their bootstrap."""

import itertools
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.special

from subtractive_jax.errors import UserError
from subtractive_jax.evaluation import distances


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(np.random.SeedSequence().entropy)


def slow_frechet(x, y):
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    with warnings.catch_warnings(action="ignore"):  # scipy on singular matrices
        root = scipy.linalg.sqrtm(s1 @ s2).real
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(s1) + np.trace(s2) - 2 * np.trace(root)


def clouds(rng, *counts, dimensions=20):
    return [
        rng.normal(size=(count, dimensions)) @ rng.normal(size=(dimensions, dimensions)) + rng.normal(size=dimensions)
        for count in counts
    ]


def test_frechet_by_hand_uses_sample_covariance():
    x, y = np.array([[0.0], [2.0]]), np.array([[1.0], [5.0]])  # means 1 and 3, variances 2 and 8 with ddof 1
    assert distances.frechet(x, y) == pytest.approx(4 + 2 + 8 - 2 * 4, abs=1e-9)


@pytest.mark.parametrize("counts", [(300, 200), (12, 9)])
def test_frechet_equals_the_published_code(rng, counts):
    x, y = clouds(rng, *counts)
    assert distances.frechet(x, y) == pytest.approx(slow_frechet(x, y), rel=1e-5)


def test_frechet_of_one_sample_is_refused():
    with pytest.raises(UserError, match="two samples"):
        distances.frechet(np.zeros((1, 4)), np.zeros((9, 4)))


def test_frechet_infinity_is_the_intercept_over_one_by_n(rng):
    x, y = clouds(rng, 700, 1300, dimensions=5)
    drawn = np.random.default_rng(3)
    counts = [int(count) for count in np.linspace(500, 1300, 25)]
    values = [slow_frechet(x, y[drawn.integers(1300, size=count)]) for count in counts]
    inverse = 1.0 / np.array(counts)
    slope = np.sum((inverse - inverse.mean()) * (values - np.mean(values))) / np.sum((inverse - inverse.mean()) ** 2)
    expected = np.mean(values) - slope * inverse.mean()
    assert distances.frechet_infinity(x, y, seed=3) == pytest.approx(expected, rel=1e-5)


def test_frechet_infinity_takes_the_bias_of_few_samples_away():
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(20_000, 40))
    finite, infinite = [], []
    for seed in range(5):
        candidate = generator.normal(size=(2_000, 40))
        finite.append(distances.frechet(reference, candidate[:500]))
        infinite.append(distances.frechet_infinity(reference, candidate, seed))
    assert abs(np.mean(infinite)) < 0.5 * np.mean(finite)  # the same distribution: the truth is 0


def slow_kad(x, y):
    spread = np.median([np.linalg.norm(a - b) for a, b in itertools.combinations(x, 2)])

    def kernel(a, b):
        return np.exp(-np.sum((a - b) ** 2) / (2 * spread**2 + 1e-8))

    within = [
        sum(kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))
        for z in (x, y)
    ]
    return 100 * (sum(within) - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y)))


def test_kad_equals_a_double_loop_with_the_bandwidth_of_the_reference(rng):
    x, y = clouds(rng, 30, 21)
    y *= 3.0
    assert distances.kad(x, y) == pytest.approx(slow_kad(x, y), rel=1e-6)
    assert distances.kad(y, x) == pytest.approx(slow_kad(y, x), rel=1e-6)
    assert distances.kad(x, y) != pytest.approx(distances.kad(y, x), rel=1e-3)


def test_kad_of_files_drawn_again_is_that_of_their_patches(rng):
    sizes = (4, 1, 6, 3)
    reference, candidate = ([rng.normal(size=(size, 7)) + shift for size in sizes] for shift in (0.0, 0.4))
    measured = distances.KernelDistance(reference, candidate)
    assert measured(np.arange(4), np.arange(4)) == pytest.approx(
        distances.kad(np.concatenate(reference), np.concatenate(candidate))
    )
    drawn = [candidate[index] for index in (2, 0, 2, 1)]
    expected = distances.kad(np.concatenate(reference), np.concatenate(drawn))
    assert measured(np.arange(4), np.array([2, 0, 2, 1])) == pytest.approx(expected)


def test_kad_of_one_distribution_is_around_zero():
    generator = np.random.default_rng(0)
    same = [distances.kad(*generator.normal(size=(2, 40, 3))) for _ in range(50)]
    assert min(same) < 0.0 < max(same) and abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(50)
    assert distances.kad(generator.normal(size=(40, 3)), generator.normal(size=(40, 3)) + 2.0) > 5 * max(same)


def test_kad_of_one_patch_is_refused():
    with pytest.raises(UserError, match="two patches"):
        distances.kad(np.zeros((9, 4)), np.zeros((1, 4)))


def test_prompt_adherence_equals_its_formula(rng):
    candidate, real, shuffled = clouds(rng, 60, 50, 40, dimensions=6)
    to_shuffled, to_real, scale = (
        slow_frechet(*pair) for pair in ((candidate, shuffled), (candidate, real), (real, shuffled))
    )
    expected = 0.5 + (to_shuffled - to_real) / (2 * max(scale, abs(to_shuffled - to_real)))
    assert distances.prompt_adherence(candidate, real, shuffled) == pytest.approx(expected, rel=1e-5)


def test_prompt_adherence_runs_from_strangers_to_pairs(rng):
    real, shuffled = clouds(rng, 50, 50, dimensions=6)
    assert distances.prompt_adherence(real, real, shuffled) == pytest.approx(1.0)
    assert distances.prompt_adherence(shuffled, real, shuffled) == pytest.approx(0.0, abs=1e-9)
    assert distances.prompt_adherence(real + 1e3, real, real) == 0.5
    assert 0.0 <= distances.prompt_adherence(*clouds(rng, 9, 9, 9)) <= 1.0


def test_kl_by_hand():
    target, generated = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    expected = (
        0.5 * np.log(0.5 / (0.25 + 1e-6)) + 0.25 * np.log(0.25 / (0.5 + 1e-6)) + 0.25 * np.log(0.25 / (0.25 + 1e-6))
    )
    np.testing.assert_allclose(distances.kl_softmax(target, generated), [expected], rtol=1e-12)


def test_kl_is_of_target_and_generated_in_this_order(rng):
    target, generated = rng.normal(size=(2, 7, 50)) * 3
    p, q = scipy.special.expit(target), scipy.special.expit(generated)
    expected = (p * (np.log(p) - np.log(q + 1e-6))).sum(-1)
    np.testing.assert_allclose(distances.kl_sigmoid(target, generated), expected, rtol=1e-9)
    assert not np.allclose(distances.kl_softmax(target, generated), distances.kl_softmax(generated, target))


def test_bootstrap_covers_the_mean():
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        values = generator.normal(size=40)
        estimate = distances.bootstrap(lambda i, values=values: float(values[i].mean()), [40], 200, seed)
        assert estimate.low < estimate.value < estimate.high
        covered += estimate.low < 0.0 < estimate.high
    assert 0.88 < covered / 200 < 0.99


def test_bootstrap_draws_pairs_together():
    drawn = []

    def difference(i, j):
        drawn.append((i, j))
        return float(np.mean(i) - np.mean(j))

    paired = distances.bootstrap(difference, [9, 9], 20, paired=True)
    assert paired.low == paired.value == paired.high == 0.0
    distances.bootstrap(difference, [9, 5], 20)
    assert {(len(i), len(j)) for i, j in drawn} == {(9, 9), (9, 5)}
