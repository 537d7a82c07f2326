"""The shapes that travel between the files, each documented once.

Letters: N games in step, B batch size, S stack size, H x W = 84 x 84 pixels. One *step* is one decision of the agent in
one game, which is FRAME_SKIP emulator frames; one *row* is one step of every game.
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

FRAME_SHAPE = (84, 84)


class Transition(NamedTuple):
    """One row: what the games answered to one action each. The row that `reset` returns has no action before it."""

    frames: Tensor  # [N, H, W] uint8, the newest frame, seen after `actions`
    actions: Tensor  # [N] int64, the actions that were really executed
    rewards: Tensor  # [N] float32, clipped to [-1, 1]
    terminals: Tensor  # [N] bool, whether this action ended the game, or a life where that counts; no truncation does
    ages: Tensor  # [N] int64, earlier frames of this game, at most max(S - 1, 1); 0: its first, no action led there


class Batch(NamedTuple):
    """Transitions to learn from. The TD target is `returns + discounts * Q`, of the best action in `next_states`.

    Q is the target network's, and which action is best is for the policy to say in Double DQN, else for the target
    network. With ATOMS that holds for each atom, and no further than V_MAX.
    """

    states: Tensor  # [B, S, H, W] uint8
    actions: Tensor  # [B] int64
    returns: Tensor  # [B] float32, discounted sum of up to N_STEP rewards
    next_states: Tensor  # [B, S, H, W] uint8
    discounts: Tensor  # [B] float32, gamma^k after k steps, 0 where a terminal is among them
    weights: Tensor  # [B] float32, importance weights; of uniform replay 1, or 0 where no transition was found
    indices: Tensor  # [B] int64, where the memory finds these transitions again


class Episode(NamedTuple):
    """What was gained in one game, or in one life of it."""

    score: float  # the game's own points
    clipped: float  # the sum of the rewards clipped to [-1, 1]
    steps: float


class Evaluation(NamedTuple):
    """What an evaluation found: a row of rewards.txt."""

    number: int
    step: int
    minutes: float  # that the run had worked for
    scores: list[float]  # of its games

    @property
    def mean(self) -> float:
        """The mean score."""
        return float(np.mean(self.scores))

    @property
    def row(self) -> str:
        """The line of rewards.txt."""
        return f"{self.number:3d} {self.step:8d} {self.mean:.1f}\n"


def best_of(evaluations: list[Evaluation]) -> Evaluation:
    """The last of those with the highest mean score."""
    return max(reversed(evaluations), key=lambda evaluation: evaluation.mean)
