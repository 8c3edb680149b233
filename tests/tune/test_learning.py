"""The loss of a short run: each way it can go is told apart, with the figure in the sentence."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import combinations, permutations

import h200
import pytest

from lorapatch.tune.learning import _chance, judge


def curve(steps: int, fall: float, noise: float = 0.0, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [2.5 - fall * step + rng.gauss(0, noise) for step in range(steps)]


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_a_falling_loss_is_falling(steps: int) -> None:
    found = judge(curve(steps, 1.0 / steps, 0.01))
    assert found.state == "falling" and found.learns
    assert found.slope == pytest.approx(-1 / steps, rel=0.2)
    assert found.low is not None and found.high is not None and found.low <= found.slope <= found.high < 0
    assert f"{found.slope:+.3g} a step" in found.sentence


def test_noise_alone_is_flat_whatever_its_seed() -> None:
    states = [judge(curve(20, 0.0, 0.1, seed)).state for seed in range(300)]
    # One in twenty is believed by chance, on either side.
    assert states.count("flat") >= 255 and states.count("falling") <= 24 and states.count("diverging") <= 24


@pytest.mark.parametrize("steps", [4, 5, 6, 10, 11])
def test_few_steps_of_noise_are_not_believed_more_often(steps: int) -> None:
    states = [judge(curve(steps, 0.0, 0.1, seed)).state for seed in range(600)]
    assert states.count("falling") <= 45 and states.count("diverging") <= 45 and states.count("flat") >= 510


@pytest.mark.parametrize("name", h200.LOSSES)
def test_a_fall_behind_a_warm_up_is_falling(name: str) -> None:
    losses = h200.LOSSES[name]
    told, untold = judge(losses, h200.RATES), judge(losses)
    assert told.state == untold.state == "falling", untold.sentence
    # The step at a learning rate of 0 is left out where the rate was logged: the rest falls at every step.
    assert told.high is not None and told.high < 0 and "12.78 to" in told.sentence and told.sentence.endswith("in 4 steps")
    assert untold.sentence.endswith("in 5 steps")


def test_a_warm_up_does_not_make_a_fall_of_noise() -> None:
    assert judge([2.51, 2.49, 2.52, 2.5, 2.48], h200.RATES).state == "flat"
    assert judge([2.5, 2.4, 3.0, 7.0, 12.0], h200.RATES).state == "diverging"
    assert judge([2.5, 2.5, 9.0, 2.6, 2.5], h200.RATES).state == "spiking"
    assert "at step 3" in judge([2.5, 2.5, 9.0, 2.6, 2.5], h200.RATES).sentence  # counted from the first
    found = judge([12.61, 12.62], h200.RATES[:2])
    assert found.state == "unknown" and found.sentence == "1 step is too few to say, 1 at a learning rate of 0 not counted"
    assert judge([2.0, 1.5, 1.2, 1.0], [None, None, 2e-4, 0.0]).state == "falling"  # rates nobody logged, and a last one of 0


def test_pairs_are_counted_out_exactly_with_their_ties() -> None:
    for losses in ([1, 2, 3, 4], [1, 1, 2, 3, 4], [1, 1, 2, 2, 3, 3], [1, 2, 2, 2, 3, 4]):
        orders = list(permutations(losses))
        excess = [sum((b > a) - (b < a) for a, b in combinations(order, 2)) for order in orders]
        for least in range(-6, 16):
            share = sum(value >= least for value in excess) / len(orders)
            assert _chance(list(Counter(losses).values()), least) == pytest.approx(share)


def test_a_real_fall_within_the_noise_is_weak() -> None:
    found = judge([2.5 - 0.001 * step + (0.04 if step % 2 else -0.04) for step in range(50)])
    assert found.state == "weak" and found.noise is not None and found.noise > 0.05 and "noise" in found.sentence
    assert judge(curve(50, 0.0006)).state == "weak"  # sure, but two per cent would be worth its name


def test_the_state_is_found_through_single_outliers() -> None:
    losses = curve(20, 0.05, 0.01)
    losses[0] += 3  # the first step of a warm-up
    assert judge(losses).state == "falling"


def test_a_jump_is_a_spike_and_says_where() -> None:
    losses = curve(20, 0.03, 0.02)
    losses[12] = 9.0
    found = judge(losses)
    assert found.state == "spiking" and "9 at step 13" in found.sentence


def test_a_jump_that_does_not_come_back_is_told_from_a_flat_loss() -> None:
    # A model that was trained already, at a learning rate ten times too high.
    losses = [0.6389, 0.7322, 5.15, 2.725, 3.43, 1.867, 1.335, 1.531, 0.8572, 1.136, 0.9399, 0.8977]
    found = judge(losses)
    assert found.state == "spiking" and "5.15 at step 3 and has not come back" in found.sentence


def test_a_rising_loss_diverges() -> None:
    assert judge(curve(20, -0.1, 0.05)).state == "diverging"
    assert judge([2.5, 2.4, 3.0, 7.0, 12.0]).state == "diverging"
    assert judge([2.5, 2.6, 40.0, 900.0, 1200.0]).state == "diverging"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_number_is_named_with_its_step(bad: float) -> None:
    found = judge([2.5, 2.4, bad, bad])
    assert found.state == "nan" and "step 3" in found.sentence and str(bad) in found.sentence


def test_zero_and_too_few_are_said() -> None:
    assert judge([0.0, 0.0, 0.0]).state == "zero"
    assert judge([2.0, 1.0]).state == "unknown" and judge([]).state == "unknown"
    assert judge([2.0, 1.0]).sentence == "2 steps are too few to say" and judge([3.0, 2.0, 1.0]).state == "unknown"
