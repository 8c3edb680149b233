"""A GPU and a model that exist on paper: what a run would take and show, for tests of the decisions."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from lorapatch.lora.flags import ALL_MODULES
from lorapatch.tune.configuration import Configuration
from lorapatch.tune.decide import Decision, decide
from lorapatch.tune.ladder import Machine, Space, open_space, read_ladder
from lorapatch.tune.trial import Goal, Prediction, Trial

__all__ = ["GIB", "START", "World", "budget", "space", "tuned"]

GIB = 1 << 30
SEVEN = ",".join(ALL_MODULES)
START = Configuration(
    4, 32, checkpointing=True, max_length=2048, learning_rate=2e-4, deepspeed="zero2.json", target_modules=SEVEN
)


def budget(size_GiB: float, **more: object) -> Goal:
    return Goal(int(size_GiB * GIB), **more)  # type: ignore[arg-type]


ONE_GPU = Machine(1, (("offload", "z_offload.json"),))


def space(start: Configuration = START, ladder: str = "bytes", machine: Machine = ONE_GPU) -> Space:
    return open_space(read_ladder(ladder), start, machine, lambda configuration: None)


@dataclass
class World:
    """Memory as MGM-2B has it, about; ``error`` is what predictions are wrong by, ``works`` the learning rates that learn."""

    error: Callable[[int], int] = lambda size: size
    works: tuple[float, float] = (1e-4, 1e-3)
    broken: dict[str, object] = field(default_factory=dict)  # fields whose value makes a run fail
    diagnosis: str = ""  # and what those that fail are diagnosed with
    asked: list[tuple[Configuration, bool]] = field(default_factory=list)

    def bytes(self, c: Configuration) -> int:
        """What a run takes of the GPU."""
        weights = {16: 5.9, 8: 3.6, 4: 2.5}[c.bits]
        lora = 0.02 * c.r / 16 * len((c.target_modules or "").split(","))
        states = 0.0 if c.offload else 0.35
        sample = (0.22 if c.checkpointing else 1.7) * min(c.max_length or 2048, 640) / 640
        return int((2.1 + weights + lora + states + sample * c.micro_batch) * GIB)

    def predict(self, c: Configuration, exact: bool) -> Prediction:
        self.asked.append((c, exact))
        size = self.error(self.bytes(c))
        return Prediction(size * 9 // 10, size, size * 11 // 10, 2 * GIB, "trace" if exact else "closed form")

    def samples_per_s(self, c: Configuration) -> float:
        work = 0.032 * (1 if c.checkpointing else 0.75) * {16: 1, 8: 2.2, 4: 1.3}[c.bits]
        return c.micro_batch / (0.16 + work * c.micro_batch)

    def losses(self, c: Configuration, steps: int, seed: int = 0) -> tuple[float, ...]:
        rng = random.Random(f"{c}{steps}{seed}")
        rate, (low, high) = c.learning_rate, self.works
        if rate > high:
            return tuple(2.5 * 1.5**step for step in range(steps))
        fall = 0.03 if rate >= low else 0.0
        return tuple(2.5 - fall * step + rng.gauss(0, 0.02) for step in range(steps))

    def run(self, number: int, decision: Decision, goal: Goal) -> Trial:
        """What the runner would bring back."""
        c = decision.configuration
        assert c is not None
        size = self.bytes(c)
        failed = any(getattr(c, name) == value for name, value in self.broken.items())
        outcome = "failed" if failed else "oom" if size > goal.budget_B else "fits"
        ran = outcome == "fits"
        return Trial(
            number, decision.purpose, c, decision.steps, min(c.accumulation, 2), decision.reason, outcome,
            predicted=self.predict(c, False),
            expected_B=decision.expected_B,
            measured_B=size if ran else None,
            samples_per_s=self.samples_per_s(c) if ran else None,
            losses=self.losses(c, decision.steps) if ran else (),
            seconds=30.0,
            cause="bitsandbytes is not there" if failed else "",
            diagnosis=self.diagnosis if failed else "",
            remedy="pip install bitsandbytes" if failed else "",
            first_step_s=20.0 if ran else None,
        )  # fmt: skip


def tuned(world: World, goal: Goal, where: Space | None = None) -> tuple[list[Trial], Decision]:
    """All runs of a tuning in that world, and its end."""
    where = where or space()
    trials: list[Trial] = []
    while True:
        decision = decide(where, goal, trials, world.predict)
        if decision.configuration is None:
            return trials, decision
        assert decision.reason and len(trials) < 40
        trials.append(world.run(len(trials) + 1, decision, goal))
