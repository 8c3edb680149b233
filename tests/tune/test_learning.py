"""The loss of a short run: each way it can go is told apart, with the figure in the sentence."""

from __future__ import annotations

import math
import random

import pytest

from lorapatch.tune.learning import judge


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
    # An interval of 95 %: about one in forty lies outside of it on either side.
    assert states.count("flat") >= 270 and states.count("falling") <= 18 and states.count("diverging") <= 18


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
