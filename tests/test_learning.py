"""Whole runs on games small enough to solve by hand: what is learned must be what dynamic programming says.

The games stand behind AtariEnv's interface and everything else is real: the loop, the agent, the memories, the files.
Training acts at random, so the data never depend on what is learned; the scores are those of greedy evaluations.
"""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import main
from utils_drl import Agent, read_model
from utils_types import Transition

GAMMA = 0.8
LIVES = 2
EVAL_STEPS = 20  # an evaluation game's limit
SMALL = {
    "NUM_ENVS": 4,
    "STACK_SIZE": 1,  # a state is one picture
    "EPS_START": 1.0,
    "EPS_END": 1.0,
    "BATCH_SIZE": 16,
    "MEM_SIZE": 1024,
    "LEARNING_RATE": 3e-4,
    "AVERAGE_STEPS": 1,  # models are the networks of the moment, whose targets are known
    "EVAL_EPISODES": 1,
    "EVAL_EPS": 0.0,
    "DEVICE": "cpu",
    "PRECISION": "float32",
}


class Move(NamedTuple):
    """What an action does."""

    reward: float
    to: str = "start"
    ends: bool = False  # a life
    cut_off: bool = False  # the game, without a terminal: the value of `to` still counts


Table = dict[str, list[list[Move]]]  # for every state and action the moves, which are made in turn

# A small reward at once, a large one after four steps, and a way towards the large one that costs and is cut off.
CORRIDOR: Table = {
    "start": [[Move(0.3, ends=True)], [Move(0.0, "first")], [Move(-0.1, "first", cut_off=True)]],
    "first": [[Move(0.0, "second")]] * 3,
    "second": [[Move(0.0, "third")]] * 3,
    "third": [[Move(1.0, ends=True)]] * 3,
}
CORRIDOR_VALUES = {
    "start": [0.3, GAMMA**3, -0.1 + GAMMA**3],
    "first": [GAMMA**2] * 3,
    "second": [GAMMA] * 3,
    "third": [1.0] * 3,
}

# A game without end. One step in 17 is a lottery, which pays once in eight times.
LOTTERY: Table = {
    "start": [[*[Move(0.5)] * 15, Move(0.5, "lottery")]],
    "lottery": [[Move(1.0), *[Move(0.0)] * 7]],
}
WIN_SHARE = 1 / (17 * 8)
LOTTERY_VALUE = 1 / 8


def pictures(table: Table) -> dict[str, np.ndarray]:
    """A frame of coarse random blocks for every state, and one for the end of a game."""
    rng = np.random.default_rng(0)
    blocks = {state: rng.integers(2, size=(12, 12), dtype=np.uint8) * 255 for state in [*table, "over"]}
    return {state: np.kron(block, np.ones((7, 7), np.uint8)) for state, block in blocks.items()}


class Game:
    """One game of `table`; `turns` counts the moves made from each state by each action, in all games that share it."""

    def __init__(self, table: Table, turns: Counter):
        self.table, self.turns = table, turns
        self.restart()

    def restart(self) -> Move:
        """Begin a game: the row after the end of the one before."""
        self.state, self.lives, self.over, self.age = "start", LIVES, False, 0
        return Move(0.0)

    def step(self, action: int) -> Move:
        """Make a move, or begin the next game if this one is over: then the action is ignored."""
        if self.over:
            return self.restart()
        moves, turn = self.table[self.state][action], self.turns[self.state, action]
        self.turns[self.state, action] += 1
        move = moves[turn % len(moves)]
        self.lives -= move.ends
        self.over = move.cut_off or self.lives == 0
        self.state, self.age = "over" if self.lives == 0 else move.to, 1
        return move


class TableEnv:
    """Games of `table` behind AtariEnv's interface, for a stack size of 1."""

    def __init__(self, table: Table, num_envs: int):
        self.game, self.table, self.pictures, self.rules = "table", table, pictures(table), {}
        turns = Counter()
        self.games = [Game(table, turns) for _ in range(num_envs)]
        self.finished_games, self.finished_lives = [], []

    def get_action_dim(self):
        """The number of actions."""
        return len(self.table["start"])

    def reset(self, seed):
        """Start every game anew; return states and the first row."""
        return self._row(np.zeros(len(self.games), np.int64), [game.restart() for game in self.games])

    def send(self, actions):
        """Start one step of every game."""
        self.sent = actions

    def recv(self):
        """The states after the step and its row."""
        return self._row(self.sent, [game.step(action) for game, action in zip(self.games, self.sent, strict=True)])

    def step(self, actions):
        """`send` and `recv` in one."""
        self.send(actions)
        return self.recv()

    def evaluate(self, agent, episodes, epsilon, seed, *, max_frames, record=False):
        """Scores of whole games, played by an environment of their own."""
        rng = np.random.default_rng(seed)
        games, scores, playing = TableEnv(self.table, episodes), np.zeros(episodes), np.ones(episodes, bool)
        states, _ = games.reset(seed)
        for _ in range(EVAL_STEPS):
            states, row = games.step(agent.run(states, epsilon=epsilon, rng=rng))
            scores += row.rewards.numpy() * playing
            playing &= [not game.over for game in games.games]
        return scores

    def _row(self, actions, moves):
        frames = torch.from_numpy(np.stack([self.pictures[game.state] for game in self.games]))
        row = Transition(
            frames,
            torch.from_numpy(actions),
            torch.tensor([move.reward for move in moves]),
            torch.tensor([move.ends for move in moves]),
            torch.tensor([game.age for game in self.games]),
        )
        return frames[:, None], row


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A function that runs main.main() on a table; returns each model's values [state][action], and the scores."""

    def start(table: Table, **constants):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(main, "AtariEnv", lambda game, num_envs, device, **options: TableEnv(table, num_envs))
        for name, value in {**SMALL, **constants}.items():
            monkeypatch.setattr(main, name, value)
        main.main()
        frames = torch.from_numpy(np.stack([*pictures(table).values()]))[:, None]
        models = []
        for path in sorted(Path("models").glob("model_*")):
            agent = Agent(**read_model(path)[1])
            agent.load(path)
            path.unlink()  # 7 MB each
            models.append(dict(zip(pictures(table), agent.values(frames).tolist(), strict=True)))
        return models, [float(line.split()[2]) for line in Path("rewards.txt").read_text().splitlines()]

    return start


def backed_up(table: Table, values: dict, n_step: int) -> dict:
    """The `n_step` TD targets of every state and action, where only the first of those actions makes a difference."""

    def target(move: Move, steps: int) -> float:
        if move.ends:
            return move.reward
        if steps == 1 or move.cut_off:
            return move.reward + GAMMA * max(values[move.to])
        return move.reward + GAMMA * target(table[move.to][0][0], steps - 1)

    return {state: [target(moves[0], n_step) for moves in actions] for state, actions in table.items()}


def largest_gap(values: dict, expected: dict) -> float:
    """The largest difference between `values` and `expected`, over the states of `expected` and all actions."""
    return max(abs(np.array(values[state]) - expected[state]).max() for state in expected)


@pytest.mark.parametrize(
    ("prioritized", "n_step", "periods", "returns"),
    [
        pytest.param(False, 1, 4, {}, id="uniform-1step"),
        pytest.param(True, 3, 2, {}, id="prioritized-3step"),
        pytest.param(True, 3, 2, {"QUANTILES": 4}, id="quantiles-3step"),
        pytest.param(False, 1, 4, {"ATOMS": 31, "V_MAX": 1.5}, id="atoms-1step"),
    ],
)
def test_values_go_back_n_steps_per_target_period_until_they_are_exact(run, prioritized, n_step, periods, returns):
    """Every model is evaluated as it becomes the target, so the next one must hold its TD targets and no others'."""
    period = 480  # steps
    models, scores = run(
        CORRIDOR,
        **returns,
        PRIORITIZED=prioritized,
        DOUBLE_DQN=False,
        N_STEP=n_step,
        GAMMA=GAMMA,
        BATCH_SIZE=8,
        POLICY_UPDATE=4,
        TARGET_UPDATE=period,
        EVALUATE_FREQ=period,
        WARM_STEPS=period,
        MAX_STEPS=(1 + periods) * period,
    )
    assert models[1] == models[0], "the first period is for warming up"
    assert len(models) == periods + 2
    assert largest_gap(models[1], CORRIDOR_VALUES) > 0.5, "nothing was left to learn"
    for target, policy in pairwise(models[1:]):
        assert largest_gap(policy, backed_up(CORRIDOR, target, n_step)) < 0.05
    assert largest_gap(models[-1], CORRIDOR_VALUES) < 0.05
    assert scores[-1] == LIVES * 1.0  # the large reward, not the small one


def recording(memory: type, returns: list) -> type:
    """A memory class that also appends the returns of every batch it hands out to `returns`."""

    class Recording(memory):
        def sample(self, batch_size, batches=1):
            batch = super().sample(batch_size, batches)
            returns.append(batch.returns.clone())
            return batch

    return Recording


@pytest.mark.parametrize("prioritized", [False, True], ids=["uniform", "prioritized"])
def test_only_prioritized_replay_dwells_on_surprises_and_it_learns_unbiased_values(monkeypatch, run, prioritized):
    """Winning surprises for ever, everything else is soon known. Replayed often, wins must not seem frequent."""
    name, returns = ("PrioritizedReplayMemory" if prioritized else "ReplayMemory"), []
    monkeypatch.setattr(main, name, recording(getattr(main, name), returns))
    models, _ = run(
        LOTTERY,
        PRIORITIZED=prioritized,
        ALPHA=1.0,
        BETA_START=1.0,
        GAMMA=0.0,
        POLICY_UPDATE=2,
        WARM_STEPS=544,
        MAX_STEPS=544 + 640,
        EVALUATE_FREQ=64 if prioritized else 592,
    )
    late = torch.cat(returns[len(returns) // 2 :])
    times_as_often = (late == 1.0).float().mean().item() / WIN_SHARE
    if prioritized:
        assert times_as_often > 10
        value = np.mean([model["lottery"][0] for model in models[-6:]])
        assert abs(value - LOTTERY_VALUE) < 0.06
    else:  # about 20 wins, each drawn by chance
        assert 0.3 < times_as_often < 3
    assert abs(models[-1]["start"][0] - 0.5) < 0.1
