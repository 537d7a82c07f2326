"""What a person sees: curves with the right values, pictures, lines without carriage returns, and a game to watch."""

import copy
import errno
import io
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ale_py.vector_env import AtariVectorEnv
from kill_test import curves
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_agent import FakeMemory
from test_gpu import rows
from test_main import TABLE, TINY, run_in

import main
import utils_config
import utils_log
import utils_play
from utils_drl import Agent
from utils_env import AtariEnv
from utils_log import Log, draw_rewards, fit, heading, ticks
from utils_memory import PrioritizedReplayMemory, ReplayMemory
from utils_types import Episode, Evaluation


class Parts:
    """Stands in for a run, its games, its agent and its memory: whatever a test lets them say."""

    def __init__(self):
        self.evaluations = [Evaluation(0, 0, 0.1, [1.0, 3.0])]
        self.finished_games, self.finished_lives = [], []
        self.agent = SimpleNamespace(epsilon=0.25, learning_rate=0.125, read_statistics=dict)
        self.read_statistics, self.stored = dict, 1_000  # the memory's

    def __len__(self) -> int:
        return self.stored

    def log(self, start: int = 0, total: int = 100_000) -> Log:
        """A log of them."""
        self.constants = {**utils_config.check(vars(main)), "MAX_STEPS": total, "WARM_STEPS": 1_000}
        return Log(self, self, self.agent, self, start)

    def evaluate(self, log: Log, step: int, *scores: float) -> None:
        """An evaluation with these scores."""
        log.settle(step)
        with log.pause(step, "evaluating"):
            self.evaluations.append(Evaluation(len(self.evaluations), step, step / 1000, list(scores)))
            log.tell_evaluation()


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Parts in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return Parts()


# Statistics


def filled(kind, count: int, games: int = 4, **options):
    """A memory of random rows."""
    memory = kind(40 * games, games, **options)
    for row in rows(count, games):
        memory.push(row)
    return memory


def test_an_agents_statistics_are_means_over_the_updates_since_they_were_last_read():
    memory = filled(PrioritizedReplayMemory, 30)
    agent = Agent(4, dtype=torch.float64)
    assert agent.read_statistics() == {}
    for count in (3, 1):
        batches, naive = [memory.sample(8) for _ in range(count)], []
        fixed = FakeMemory(batches)
        for batch in batches:
            policy = copy.deepcopy(agent.policy)
            values = policy(batch.states).squeeze(2).gather(1, batch.actions[:, None]).squeeze(1)
            targets = batch.returns + batch.discounts * agent.target(batch.next_states).amax((1, 2))
            loss = (batch.weights * F.smooth_l1_loss(values, targets.detach(), reduction="none")).mean()
            gradients = [grad.clamp(-1, 1) for grad in torch.autograd.grad(loss, list(policy.parameters()))]
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
            naive.append([value.item() for value in (loss, values.mean(), (values - targets).abs().mean(), norm)])
            assert agent.learn(fixed, 8).item() == pytest.approx(naive[-1][0], rel=1e-6)
        told = agent.read_statistics()
        assert list(told) == ["loss", "q_value", "td_error", "gradient_norm"]
        assert list(told.values()) == pytest.approx(np.mean(naive, axis=0).tolist(), rel=1e-5)
    assert agent.read_statistics() == {}


def test_of_several_updates_at_once_the_last_one_counts():
    memory = filled(ReplayMemory, 30)
    agent = Agent(4, dtype=torch.float64)
    fixed = FakeMemory([memory.sample(8) for _ in range(5 + 2)])
    losses = [agent.learn(fixed, 8, updates).item() for updates in (5, 2)]
    told = agent.read_statistics()
    last = torch.cat([errors[-8:] for _, errors in fixed.updates])
    assert (told["loss"], told["td_error"]) == pytest.approx((np.mean(losses), last.abs().mean().item()))


@pytest.mark.parametrize("kind", [ReplayMemory, PrioritizedReplayMemory])
def test_reading_statistics_changes_no_bit_of_training(kind):
    agents, memories = [Agent(4) for _ in range(2)], [filled(kind, 30) for _ in range(2)]
    for _ in range(5):
        losses = [agent.learn(memory, 8, 2) for agent, memory in zip(agents, memories, strict=True)]
        assert torch.equal(*losses)
        agents[0].read_statistics()
        memories[0].read_statistics()
    for mine, its in zip(agents[0].policy.parameters(), agents[1].policy.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("count", [20, 100])  # rows: a memory that is filling and one that has wrapped
def test_statistics_of_priorities_are_those_of_the_transitions_that_may_be_drawn(count):
    memory = filled(PrioritizedReplayMemory, count, beta_start=0.5, beta_steps=1000)
    indices = memory.sampleable()
    memory.update_priorities(indices, torch.rand(len(indices), generator=torch.Generator().manual_seed(1)))
    priorities = memory.priorities(indices).numpy()
    chances = priorities / priorities.sum()
    newest = count * 4 - 1
    assert memory.read_statistics() == pytest.approx(
        {
            "beta": min(0.5 + 0.5 * (count - 1) * 4 / 1000, 1.0),
            "effective_sample_size": 1 / (chances**2).sum(),
            "largest_priority": priorities.max(),
            "mean_priority": priorities.mean(),
            "mean_age": (chances * (newest - indices.numpy())).sum(),
        }
    )


def test_alike_priorities_count_every_transition_and_uniform_replay_has_none():
    memory = filled(PrioritizedReplayMemory, 30)
    assert memory.read_statistics()["effective_sample_size"] == pytest.approx(len(memory.sampleable()))
    assert filled(ReplayMemory, 30).read_statistics() == {}


@pytest.mark.parametrize(("game", "max_frames", "lives"), [("breakout", 108_000, 5), ("breakout", 120, 2)])
def test_games_and_their_lives_are_told_with_scores_clipped_scores_and_steps(game, max_frames, lives):
    env, rng = AtariEnv(game, 1, max_frames=max_frames), np.random.default_rng(0)
    env.reset(3)
    steps = -1  # the step that starts the next game is none of this one
    while not env.finished_games:
        env.step(rng.integers(4, size=1))
        steps += 1
    (whole,) = env.finished_games
    assert whole.steps == steps
    assert len(env.finished_lives) == lives
    assert np.sum(env.finished_lives, axis=0).tolist() == list(whole)
    assert whole.clipped <= whole.score


def test_lives_are_told_alike_where_their_end_is_terminal_and_where_not():
    told = []
    for terminal in (True, False):
        env, rng = AtariEnv("breakout", 4, terminal_on_life_loss=terminal), np.random.default_rng(0)
        env.reset(3)
        ends = sum(int(env.step(rng.integers(4, size=4))[1].terminals.sum()) for _ in range(300))
        told.append((env.finished_lives, env.finished_games))
        assert ends == len(env.finished_lives if terminal else env.finished_games) > 0
    assert told[0] == told[1]


def test_a_game_that_ends_with_lives_it_had_won_loses_none_at_its_restart(monkeypatch):
    """At the limit of frames, as Seaquest's do; here a game has won two lives where it is older than 50 frames."""
    receive = AtariVectorEnv.recv

    def richer(self) -> tuple:
        *answer, info = receive(self)
        return *answer, info | {"lives": info["lives"] + 2 * (info["episode_frame_number"] > 50)}

    monkeypatch.setattr(AtariVectorEnv, "recv", richer)
    env, pressed = AtariEnv("breakout", 1, max_frames=60), []
    env.reset(3)
    for _ in range(20):
        pressed.append(int(env.step(np.array([2]))[1].actions[0]))
    assert len(env.finished_games) == 1
    assert all(life.steps > 0 for life in env.finished_lives)
    assert set(pressed) == {2}


def test_clipped_scores_count_points_of_any_size_as_one():
    env, rng = AtariEnv("seaquest", 2), np.random.default_rng(0)
    env.reset(0)
    while len(env.finished_games) < 2:
        env.step(rng.integers(18, size=2))
    assert sum(game.clipped for game in env.finished_games) * 20 == sum(game.score for game in env.finished_games) > 0


# Curves


def test_curves_hold_the_means_of_what_happened_between_two_points(parts):
    told = iter([{}, {}, {"loss": 0.5, "q_value": 2.0}, {"loss": 0.25, "q_value": 3.0}])
    parts.agent.read_statistics = lambda: next(told)
    parts.read_statistics = lambda: {"beta": 0.4}
    with parts.log() as log:
        parts.evaluate(log, 0, 1.0, 3.0)
        for step in range(1_000, 31_000, 1_000):
            parts.finished_games.append(Episode(step, step / 1000, 7))
            parts.finished_lives += [Episode(step / 2, 1, 3), Episode(step / 2, 1, 4)]
            log.show(step, torch.tensor(0.5))
    found = curves()
    assert found["game/score"] == [(10_000, 5_500), (20_000, 15_500), (30_000, 25_500)]
    assert found["game/clipped"] == [(10_000, 5.5), (20_000, 15.5), (30_000, 25.5)]
    assert found["life/score"] == [(10_000, 2_750), (20_000, 7_750), (30_000, 12_750)]
    assert {found["game/steps"][0][1], found["life/steps"][0][1], found["life/clipped"][0][1]} == {7.0, 3.5, 1.0}
    assert found["learning/loss"] == [(20_000, 0.5), (30_000, 0.25)]
    assert found["learning/q_value"] == [(20_000, 2.0), (30_000, 3.0)]
    assert found["replay/beta"] == [(20_000, pytest.approx(0.4)), (30_000, pytest.approx(0.4))]
    assert found["learning/epsilon"] == [(step, 0.25) for step in (10_000, 20_000, 30_000)]
    assert found["learning/learning_rate"] == [(step, 0.125) for step in (10_000, 20_000, 30_000)]
    assert found["evaluation/mean"] == [(0, 2.0)]
    assert (found["evaluation/least"], found["evaluation/most"]) == ([(0, 1.0)], [(0, 3.0)])
    assert parts.finished_games == parts.finished_lives == []


def test_the_rate_is_that_of_training_without_its_pauses(monkeypatch, parts):
    now = 100.0
    monkeypatch.setattr(utils_log.time, "perf_counter", lambda: now)
    with parts.log() as log:
        for step in (10_000, 20_000):
            now += 20
            log.show(step, None)
            with log.pause(step, "evaluating"):
                now += 300
    assert curves()["speed/steps_per_second"] == [(10_000, 500.0), (20_000, 500.0)]


def test_a_run_that_goes_back_to_a_checkpoint_shows_every_step_once(parts):
    def train(start: int, end: int, value: float) -> None:
        parts.agent.epsilon = value
        with parts.log(start) as log:
            for step in range(start + 10_000, end + 10_000, 10_000):
                log.show(step, None)
                parts.evaluate(log, step, value)

    train(0, 50_000, 0.5)
    train(20_000, 40_000, 0.25)
    for tag in ("learning/epsilon", "evaluation/mean"):
        assert curves()[tag] == [(10_000, 0.5), (20_000, 0.5), (30_000, 0.25), (40_000, 0.25)]
    train(0, 20_000, 1.0)
    assert curves()["learning/epsilon"] == [(10_000, 1.0), (20_000, 1.0)]


def test_a_whole_run_draws_every_curve_and_its_picture(run_main, tmp_path):
    assert run_main(PRIORITIZED=True)[0] == 0
    found = curves()
    learning = {
        f"learning/{name}" for name in ("loss", "q_value", "td_error", "gradient_norm", "epsilon", "learning_rate")
    }
    names = ("beta", "effective_sample_size", "largest_priority", "mean_priority", "mean_age")
    evaluation = {f"evaluation/{name}" for name in ("mean", "least", "most")}
    assert learning | {f"replay/{name}" for name in names} | evaluation | {"speed/steps_per_second"} <= found.keys()
    assert [step for step, _ in found["learning/loss"]] == [200, 400]
    assert all(np.isfinite(value) for points in found.values() for _, value in points)
    rows = [line.split() for line in Path("rewards.txt").read_text().splitlines()]
    assert [(str(step), f"{value:.1f}") for step, value in found["evaluation/mean"]] == [tuple(row[1:]) for row in rows]
    with Image.open("rewards.png") as picture:
        assert picture.format == "PNG"


def test_the_constants_stand_beside_the_curves(parts):
    with parts.log():
        pass
    reader = EventAccumulator("curves")
    reader.Reload()
    (event,) = reader.Tensors("constants/text_summary")
    table = event.tensor_proto.string_val[0].decode()
    assert "| MAX_STEPS | 100000 |" in table
    assert table.count("\n") == len(utils_config.types(vars(main))) + 1


# The picture


def test_the_picture_is_redrawn_at_every_evaluation(parts):
    pictures = []
    with parts.log() as log:
        for number in range(1, 4):
            parts.evaluate(log, number * 100_000, number, 2.0 * number, 0.0)
            pictures.append(Path("rewards.png").read_bytes())
    assert len(set(pictures)) == 3
    with Image.open(io.BytesIO(pictures[-1])) as picture:
        assert (picture.format, picture.size) == ("PNG", (800, 500))
        assert len(set(picture.convert("RGB").tobytes())) > 20, "nothing is drawn"


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """A function that draws a picture and returns the figure in it."""
    figures = []

    class Kept(utils_log.Figure):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            figures.append(self)

    def run(*evaluations: Evaluation):
        draw_rewards(tmp_path / "rewards.png", list(evaluations), "a title")
        with Image.open(tmp_path / "rewards.png") as picture:
            picture.verify()
        return figures[-1]

    monkeypatch.setattr(utils_log, "Figure", Kept)
    return run


def labels(axes) -> list[tuple[float, str]]:
    """Where the ticks of the horizontal axis stand, and what they say."""
    texts = [label.get_text() for label in axes.get_xticklabels()]
    return list(zip(map(float, axes.get_xticks()), texts, strict=True))


def test_the_picture_has_steps_below_and_the_minutes_at_which_they_were_reached_above(draw):
    steps, minutes = (0, 100_000, 200_000), (1.0, 4.0, 11.0)  # slower when learning
    evaluations = [Evaluation(n, steps[n], minutes[n], [1.0, 2.0]) for n in range(3)]
    figure = draw(*evaluations)
    below, above = figure.axes
    assert labels(below) == [(n, f"{n:,}") for n in (0, 50_000, 100_000, 150_000, 200_000)]
    assert labels(above) == [(pytest.approx(float(np.interp(n, minutes, steps))), str(n)) for n in (2, 4, 6, 8, 10)]
    assert below.get_xlim() == above.get_xlim()
    assert figure.get_suptitle() == "a title"


def test_one_evaluation_and_equal_minutes_can_be_drawn(draw):
    below, above = draw(Evaluation(0, 0, 0.34, [1.0])).axes
    assert (labels(below), labels(above)) == ([(0, "0")], [(0, "0.3")])
    draw(*(Evaluation(n, n, 0.0, [1.0]) for n in range(2)))


@pytest.mark.parametrize("scale", [0.1, 1_000_000.0])
def test_all_is_in_the_picture_and_neither_title_nor_legend_covers_another_part(draw, scale):
    figure = draw(*(Evaluation(n, n * 1000, n, [scale * (9 - n), scale * 5]) for n in range(3)))
    (title,), (legend,) = figure.texts, figure.legends
    axes = [axes.get_tightbbox() for axes in figure.axes]
    for part in (title, legend):
        assert not any(part.get_window_extent().overlaps(extent) for extent in axes)
    left, bottom, right, top = figure.bbox.extents
    for extent in (*axes, title.get_window_extent(), legend.get_window_extent()):
        assert left <= extent.x0 < extent.x1 <= right
        assert bottom <= extent.y0 < extent.y1 <= top


def test_scores_are_written_out(draw):
    below, _ = draw(*(Evaluation(n, n * 1000, n, [n * 1_000_000.0]) for n in range(3))).axes
    assert "1,500,000" in [label.get_text() for label in below.get_yticklabels()]


@pytest.mark.parametrize(
    ("first", "last", "marks"),
    [
        (0, 0, [0]),
        (0, 4_000_000, [0, 1_000_000, 2_000_000, 3_000_000, 4_000_000]),
        (0.2, 11, [2, 4, 6, 8, 10]),
        (7.31, 7.34, [7.3]),
    ],
)
def test_ticks_are_round_numbers_in_the_range(first, last, marks):
    assert ticks(first, last) == marks


def test_the_picture_is_headed_by_the_game_how_it_was_measured_and_the_options_that_are_on():
    constants = {**vars(main), "GAME": "ALE/Pong-v5", "EVAL_EPISODES": 7, "EVAL_EPS": 0.01, "SEED": 3}
    constants |= {
        "PRIORITIZED": False,
        "DOUBLE_DQN": True,
        "DUELING": False,
        "N_STEP": 3,
        "QUANTILES": 1,
        "LAYER_NORM": False,
        "ATOMS": 1,
        "AVERAGE_STEPS": 1,
    }
    assert heading(constants) == "pong: 7 games per evaluation, epsilon 0.01\nDOUBLE_DQN, N_STEP=3, SEED=3"
    constants["REPEAT_ACTION_PROBABILITY"] = 0.25
    assert heading(constants).startswith("pong: 7 games per evaluation, epsilon 0.01, actions repeat with 0.25\n")
    constants |= {"REPEAT_ACTION_PROBABILITY": 0.0, "FULL_ACTION_SPACE": True, "EVAL_FRAMES": 108_000}
    assert ", epsilon 0.01, all 18 actions, at most 108,000 frames\n" in heading(constants)
    constants |= {"PRIORITIZED": True, "DUELING": True, "LAYER_NORM": True, "N_STEP": 1, "ATOMS": 51, "V_MAX": 20.0}
    told = "PRIORITIZED, DOUBLE_DQN, DUELING, LAYER_NORM, ATOMS=51, V_MAX=20, SEED=3"
    assert heading(constants).splitlines()[1] == told
    constants |= {"ATOMS": 1, "QUANTILES": 4, "AVERAGE_STEPS": 500}
    assert heading(constants).splitlines()[1].endswith("LAYER_NORM, QUANTILES=4, AVERAGE_STEPS=500, SEED=3")


# The console


@pytest.fixture
def run_main(monkeypatch, tmp_path, capsys):
    """A function that runs main.py with tiny constants in an empty directory; its status and what it told."""

    def run(**values) -> tuple[int, str]:
        capsys.readouterr()
        status = run_in(tmp_path, **values)
        return status, capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    return run


class Terminal(io.StringIO):
    """A stderr that is one."""

    def __init__(self, columns: int):
        super().__init__()
        self._ends = os.openpty()
        termios.tcsetwinsize(self._ends[1], (24, columns))

    def isatty(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """Where its size can be asked for."""
        return self._ends[1]

    def lines(self) -> list[str]:
        """All that stood in it, each time the line was written anew, but for what wiped it out."""
        return [line.rstrip() for line in re.split("[\r\n]", self.getvalue()) if line.strip()]

    def close(self) -> None:
        """Give the size's owner back."""
        super().close()
        for end in self._ends:
            os.close(end)


@pytest.fixture
def terminal(monkeypatch):
    """A function that makes stderr a terminal of so many columns."""
    made = []

    def make(columns: int) -> Terminal:
        made.append(Terminal(columns))
        monkeypatch.setattr(sys, "stderr", made[-1])
        monkeypatch.setenv("COLUMNS", "500")  # stdout's, which is not asked
        return made[-1]

    yield make
    monkeypatch.undo()
    for each in made:
        each.close()


@pytest.fixture
def clock(monkeypatch):
    """The time, for a test to put on."""
    clock = SimpleNamespace(now=1000.0)
    for name in ("perf_counter", "monotonic"):
        monkeypatch.setattr(utils_log.time, name, lambda: clock.now)
    return clock


class FullDisk(io.StringIO):
    """A file on one."""

    def write(self, text: str) -> int:
        """There is no room."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_log_on_a_full_disk_has_gaps_and_the_run_goes_on(monkeypatch, run_main):
    monkeypatch.setattr(sys, "stderr", FullDisk())
    assert run_main(**TABLE, MAX_STEPS=2_000)[0] == 0
    assert len(Path("rewards.txt").read_text().splitlines()) == 11


def test_a_terminal_without_columns_gets_lines(parts, terminal, clock):
    stderr = terminal(0)
    with parts.log(total=3_000) as log:
        for step in (0, 1_000):
            clock.now += 40
            log.show(step, None)
    begins = [line.partition(":")[0] for line in stderr.lines()]
    assert begins == ["step 0 of 3,000", "step 1,000 of 3,000"]


@pytest.mark.parametrize(
    ("load", "threads", "device", "told"),
    [(2.06, 4, "cpu", True), (1.9, 4, "cpu", False), (2.06, 1, "cpu", False), (2.06, 4, "cuda", False)],
)
def test_a_busy_processor_is_told_where_threads_would_wait_for_each_other(monkeypatch, load, threads, device, told):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    told_device = {"device": "one", "precision": "float32"}
    monkeypatch.setattr(utils_log.utils_machine, "describe_device", lambda *_: told_device)
    lines = utils_log.introduction(vars(main), torch.device(device), "").splitlines()
    sentence = "the processor was busy in the last minute (load 2.1): beside other programs --THREADS=1 is several"
    assert any(line.startswith(sentence) for line in lines) == told


def test_a_terminal_gets_a_bar_with_a_clean_line_per_evaluation_above_it(parts, terminal, clock):
    stderr = terminal(160)
    with parts.log(total=3_000) as log:
        parts.finished_games += [Episode(4, 1, 1), Episode(5, 1, 1)]
        for step in (0, 1_000):
            clock.now += 8
            log.show(step, torch.tensor(0.125))
        parts.evaluate(log, 2_000, 0.0, 3.0)
    lines = stderr.lines()
    words = "125 steps/s, 16s left, evaluation score 2.0, best 2.0, training score 4.5, loss 0.1250, epsilon 0.25"
    bars = [line for line in lines if line.startswith(f"33.3% {words} |")]
    assert [re.sub(r"[^█#]", "", bar)[:3] for bar in bars] in (["███"], ["###"])
    assert any(line.startswith("66.7% evaluating |") for line in lines)
    told = "step 2,000: mean score 1.5 of 2 games, 0 to 3; best mean 2.0 at step 0"
    assert told in lines
    assert all(told == line for line in lines if line.startswith("step"))
    assert "evaluation score 1.5, best 2.0" in lines[-1]


def test_scores_of_millions_are_written_out(parts, capsys):
    with parts.log() as log:
        parts.evaluate(log, 2_000, 0.0, 2_469_134.0)
    assert "of 2 games, 0 to 2,469,134; best" in capsys.readouterr().err


def test_eighty_columns_hold_all_that_is_asked_for(parts, terminal, clock):
    stderr = terminal(80)
    parts.agent.epsilon = 0.0123
    parts.evaluations = [Evaluation(1, 0, 1.0, [27.2]), Evaluation(2, 10, 2.0, [23.9])]
    with parts.log(total=10_000_000) as log:
        parts.finished_games += [Episode(18.3, 1, 1)]
        for step in (3_455_000, 3_456_000):
            clock.now += 1000 / 215
            log.show(step, torch.tensor(0.0068))
    line = stderr.lines()[-1]
    assert line.startswith("34.6% 215/s, 8.5h left, eval 23.9 best 27.2 train 18.3, loss 0.0068 eps 0.01 |")
    assert len(line) < 80


@pytest.mark.parametrize("room", range(0, 130, 7))
def test_what_does_not_fit_is_left_out_whole_and_from_the_end(room):
    words = "215 steps/s, 8.5h left, evaluation score 23.9, best 27.2, training score 18.3, loss 0.0068, epsilon 0.01"
    short = "215/s, 8.5h left, eval 23.9 best 27.2 train 18.3, loss 0.0068 eps 0.01"
    told = fit(words, room)
    assert len(told) <= room
    assert told == words or (len(words) > room and f"{short}, ".startswith(f"{told}, " if told else ""))


def test_the_time_left_is_that_of_learning_and_the_rates_leave_out_what_comes_before(parts, terminal, clock):
    stderr, parts.stored = terminal(160), 0
    with parts.log(total=10_000) as log:

        def say(step: int, seconds: float, loss: float | None) -> str:
            clock.now += seconds
            parts.stored = step // 4
            log.show(step, loss)
            return re.sub(r".*% |, evaluation.*", "", stderr.lines()[-1])

        assert say(1_000, 30, None) == "warming up 25%"
        assert say(2_000, 0.5, None) == "2,000 steps/s, warming up 50%"
        assert say(3_000, 0.25, None) == "2,667 steps/s, warming up 75%"
        assert say(5_000, 60, 0.5) == "learning starts"
        assert say(6_000, 10, 0.5) == "100 steps/s, 40s left"
        assert say(7_000, 30, 0.5) == "50 steps/s, 1m left"


def test_a_run_that_goes_on_does_not_warm_up_again(parts, terminal):
    stderr = terminal(160)
    with parts.log(start=50_000) as log, log.pause(50_000, "starting"):
        pass
    assert "starting" in stderr.getvalue()
    assert stderr.lines()[-1].startswith("50.0% learning goes on, evaluation score 2.0")


def test_without_a_terminal_there_are_lines_at_most_every_so_often(parts, clock, capsys):
    with parts.log() as log:
        for step in range(1_000, 10_000, 1_000):
            log.show(step, None)
            clock.now += utils_log.LINE_SECONDS / 3
    told = capsys.readouterr().err
    assert "\r" not in told
    assert [line.split(":")[0] for line in told.splitlines()] == [f"step {n},000 of 100,000" for n in (1, 4, 7)]
    assert "training score" not in told


def test_a_run_into_a_pipe_is_plain_lines_from_what_is_about_to_be_done_to_how_to_watch_the_best_model(tmp_path):
    constants = {**TINY, "MAX_STEPS": 2_000, "EVALUATE_FREQ": 1_000}
    command = [sys.executable, main.__file__, *(f"--{name}={value}" for name, value in constants.items())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout == b""
    assert b"\r" not in done.stderr
    told = done.stderr.decode()
    assert "warning" not in told.lower()
    lines = told.splitlines()
    assert lines[0] == "breakout: 2,000 steps, 4 games in step, learning after 100"
    assert re.fullmatch(r"on cpu \(.*\), 1 thread, float32", lines[1])
    start = told.split("step 0")[0]
    known = ("GB on cpu", "GB free", "rewards.txt", "rewards.png", "./models/", "--logdir=curves", "goes on: python ")
    for part in (*known, "making the games"):
        assert part in start
    wanted = ["step 0 of 2,000: evaluating the network", "step 0: mean", "step 0 of 2,000: starting the games"]
    wanted += ["step 1,000 of 2,000: learning starts, ", "step 1,000 of 2,000: evaluating", "step 1,000: mean"]
    wanted += ["step 2,000 of 2,000: evaluating", "step 2,000: mean"]
    steps = [line for line in lines if line.startswith("step ")]
    assert [line[: len(begin)] for line, begin in zip(steps, wanted, strict=True)] == wanted
    rows = [row.split() for row in (tmp_path / "rewards.txt").read_text().splitlines()]
    number, _, score = max(rows, key=lambda row: float(row[2]))
    model = f"models/model_{int(number):03d}"
    told = f"the highest of 3 mean scores is {score}, of {model}; to watch it play:"
    assert re.fullmatch(rf"finished after \d+s; {re.escape(told)}", lines[-2])
    assert lines[-1] == shlex.join(["python", main.__file__, f"--PLAY={model}"])
    assert (tmp_path / model).exists()


def test_the_end_names_the_last_of_the_best_models_and_the_command_that_plays_it(monkeypatch, parts):
    monkeypatch.setattr(sys, "argv", ["/my code/main.py", "--SEED=1"])
    parts.models = Path("models")
    parts.evaluations = [Evaluation(n, 1_000 * n, 65.0 * n, [score]) for n, score in enumerate((1.0, 7.0, 7.0, 2.0))]
    assert utils_log.conclusion(parts).splitlines() == [
        "finished after 3.2h; the highest of 4 mean scores is 7.0, of models/model_002; to watch it play:",
        "python '/my code/main.py' --PLAY=models/model_002",
    ]


@pytest.mark.parametrize(("seconds", "word"), [(0, "0s"), (59, "59s"), (61, "1m"), (3_600, "1.0h"), (250_000, "69.4h")])
def test_a_span_of_time_is_one_word(seconds, word):
    assert utils_log.span(seconds) == word


# A game to watch


def save(path: Path, game: str = "breakout", **rules) -> Path:
    """A new model of `game`, which says of itself what a run's models do."""
    env = AtariEnv(game, 1, stack_size=2, **rules)
    agent = Agent(env.get_action_dim(), stack_size=2, dueling=True, quantiles=3)
    agent.save(path, rules=env.rules, step=0, scores=[0.0])
    return path


def test_a_model_plays_its_own_game_in_true_colour_one_picture_a_step(run_main, tmp_path):
    path = save(tmp_path / "model", "pong", frame_skip=20, repeat_action_probability=0.25, full_action_space=True)
    (tmp_path / "run.json").write_text("a run of something else")
    status, told = run_main(PLAY=str(path), GAME="breakout", STACK_SIZE=4, EVAL_EPS=0.5)
    assert status == 0
    said = re.fullmatch(
        rf"{path}: playing a game of pong\nscore (-?\d+), writing (\d+) pictures\nplay.gif is written\n", told
    )
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "play.gif", "run.json"]
    with Image.open("play.gif") as animation:
        assert animation.n_frames == int(said[2]) > 50
        assert animation.size == (940, 420)
        animation.seek(30)
        screen = np.asarray(animation.convert("RGB"))
    assert (screen[:, :640].min(2) != screen[:, :640].max(2)).mean() > 0.5, "only grays"
    assert (screen[:, 640:] == utils_play.CHOSEN).all(2).sum() > 10, "no action is chosen"
    for part in range(1, 4):
        assert np.array_equal(screen[:, part:640:4], screen[:, :640:4]), "pixels are square"


def test_ctrl_c_while_a_movie_is_written_leaves_the_one_before(monkeypatch, run_main, tmp_path):
    path = save(tmp_path / "model", frame_skip=20)
    (tmp_path / "play.gif").write_bytes(b"an earlier game")
    pictures = utils_play.pictures

    def interrupted(*arguments):
        yield from itertools.islice(pictures(*arguments), 3)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(utils_play, "pictures", interrupted)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as main.py has it
    try:
        status, told = run_main(PLAY=str(path), EVAL_EPS=1.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (status, told.splitlines()[-1]) == (130, "stopped by SIGINT, play.gif is not written")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", "play.gif"]
    assert (tmp_path / "play.gif").read_bytes() == b"an earlier game"


def test_a_model_may_lie_in_the_home_directory(run_main, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "mine", frame_skip=20)
    status, told = run_main(PLAY="~/mine", EVAL_EPS=1.0, EVAL_FRAMES=200)
    assert status == 0
    assert "writing 11 pictures" in told  # 200 frames are 10 steps, and one more sees the end
    assert told.startswith(f"{tmp_path}/mine: playing a game of breakout")


def test_the_pictures_show_the_recorded_game_beside_the_values_of_its_actions():
    env, agent = AtariEnv("breakout", 1), Agent(4)
    watched = utils_play.Watched(agent)
    (score,) = env.evaluate(watched, 1, 1.0, 3, record=True)
    recorded = list(env.get_recording())
    assert len(recorded) == len(watched.values) == len(watched.actions)
    points = [score for _, score in recorded]
    assert points == sorted(points)
    assert (points[0], points[-1]) == (0.0, score)
    assert score > 0
    env.evaluate(utils_play.Watched(agent), 1, 1.0, 3, record=True)
    widths = []
    for step, picture in enumerate(utils_play.pictures(env, watched, "a title")):
        pixels = np.asarray(picture)
        assert np.array_equal(pixels[::2, :640:4], recorded[step][0])
        widths.append(columns(pixels, utils_play.CHOSEN, 20))
        gains = np.diff(points[max(step - utils_play.TRACE, 0) : step + 1])
        assert columns(pixels, utils_play.POINTS, 100) == np.count_nonzero(gains)
    values = [values[action] for values, action in zip(watched.values, watched.actions, strict=True)]
    widths = np.array(widths)[np.argsort(values)]
    assert (np.diff(widths) >= 0).all()
    assert widths[0] < widths[-1] / 4


def columns(pixels: np.ndarray, colour: tuple[int, int, int], rows: int) -> int:
    """The columns beside the screen in which at least so many rows are of the colour."""
    return np.count_nonzero((pixels[:, 640:] == colour).all(2).sum(0) >= rows)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path.write_bytes(b"no model"), "is not a model of this program, or it is damaged"),
        (lambda path: path.mkdir(), "cannot read {path}: Is a directory"),
        (lambda path: path.write_bytes(save(path).read_bytes()[:5000]), "it is damaged"),
        (lambda path: Agent(4).save(path), "does not say for which game and network it is"),
        (lambda path: Agent(4).save(path, rules={"game": "brekout"}), "is it 'breakout'"),
        (lambda path: Agent(6).save(path, rules={"game": "breakout"}), "knows 6 actions, breakout has 4"),
        (lambda path: Agent(4).save(path, rules={"game": []}), "does not say for which game and network it is"),
    ],
    ids=["text", "directory", "cut", "silent", "game", "actions", "type"],
)
def test_a_model_that_cannot_play_is_refused_with_a_sentence(run_main, tmp_path, make, sentence):
    path = tmp_path / "model"
    make(path)
    status, told = run_main(PLAY=str(path))
    assert status == 2
    assert re.fullmatch(rf"error: [^\n]*{re.escape(sentence.format(path=path))}[^\n]*\n", told)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_model_that_is_not_there_is_told_with_the_last_that_is(run_main, tmp_path):
    (tmp_path / "models").mkdir()
    for name in ("model_000", "model_999", "model_1000", "model_1001.tmp", "model_best.pt"):
        (tmp_path / "models" / name).touch()
    told = "No such file or directory; the last one there is models/model_1000"
    assert run_main(PLAY="models/model_004") == (2, f"error: cannot read models/model_004: {told}\n")


def test_a_checkpoint_is_told_from_a_model(run_main):
    assert run_main(**TABLE, MAX_STEPS=200, CHECKPOINT_FREQ=200)[0] == 0
    (path,) = Path("models").glob("checkpoint_*")
    sentence = f"error: {path} is a checkpoint, from which a run goes on; models are called model_000 and so on\n"
    assert run_main(PLAY=str(path)) == (2, sentence)
    assert not Path("play.gif").exists()


def test_a_place_that_cannot_be_written_is_told_after_the_game(run_main, tmp_path):
    path = save(tmp_path / "model", frame_skip=60)
    os.mkdir("play.gif")
    status, told = run_main(PLAY=str(path), EVAL_EPS=1.0)
    assert (status, told.splitlines()[-1]) == (2, "error: cannot write play.gif: Is a directory")
