"""What a person sees: a run's bar, its curves, the picture of its scores."""

import sys
import time
from collections import deque
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils_config import command_line, describe_device
from utils_drl import Agent, write_whole
from utils_env import AtariEnv, normalize_game
from utils_run import CURVES, PICTURE, REWARDS, Evaluation, Run
from utils_types import Episode

POINT_FREQ = 10_000  # steps between points of the curves; an evaluation adds one, too
LINE_SECONDS = 30  # between the lines that stand for the bar where there is no terminal
RECENT = 100  # finished games of which the bar gives the mean score
LOOKS = 30  # over which the bar's rate is taken


def introduction(constants: dict, device: torch.device, storage: str) -> str:
    """What is about to be done with `constants`, where, and how to stop it and go on."""
    machine = describe_device(device, constants["PRECISION"])
    game = f"{normalize_game(constants['GAME'])}: {constants['MAX_STEPS']:,} steps"
    return "\n".join(
        [
            f"{game}, {constants['NUM_ENVS']} games in step, on {machine['device']}, {machine['precision']}",
            storage,
            f"results: {REWARDS}, {PICTURE}, {CURVES}/ (tensorboard --logdir={CURVES}), {constants['SAVE_PREFIX']}/",
            f"Ctrl-C stops the run at any time, and the same command goes on: {command_line()}",
        ]
    )


class Log:
    """The bar, the curves and the picture of `run`, which goes on at step `start` and ends at `total`; a context.

    Where stderr is no terminal, a line every LINE_SECONDS stands for the bar. Time spent evaluating is no one's.
    """

    def __init__(self, run: Run, env: AtariEnv, agent: Agent, memory, start: int, total: int):
        self._run, self._env, self._agent, self._memory, self._total = run, env, agent, memory, total
        # What an earlier start wrote after its checkpoint is hidden; a run's first step is that of an evaluation.
        self._curves = SummaryWriter(str(CURVES), max_queue=1000, flush_secs=30, purge_step=start + 1 if start else 0)
        if run.evaluations:
            self._draw()
        form = "{percentage:3.0f}%|{bar}| {n:,}/{total:,}{postfix}"
        self._bar = tqdm(total=total, initial=min(start, total), bar_format=form, dynamic_ncols=True, disable=None)
        self._line_due = 0.0
        self._paused, self._stopped = 0.0, None  # seconds of evaluations, and when the one that is going on began
        self._looks = deque([(self._clock(), start)], maxlen=LOOKS)
        self._point = self._looks[0]
        self._games: list[Episode] = []  # since the last point
        self._recent = deque(maxlen=RECENT)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        self._curves.close()

    def show(self, step: int, loss: Tensor | None) -> None:
        """Say how things stand at `step`, with the last `loss`, and draw the curves on. Waits for the device."""
        self._looks.append((self._clock(), step))
        self._collect()
        words = self._words(loss)
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update(min(step, self._total) - self._bar.n)
        if self._bar.disable and time.monotonic() >= self._line_due:
            print(f"step {step:,} of {self._total:,}: {words}", file=sys.stderr)
            self._line_due = time.monotonic() + LINE_SECONDS
        if step // POINT_FREQ > self._point[1] // POINT_FREQ:
            self._add_point(step)

    def evaluating(self, games: int) -> None:
        """The clock stops for an evaluation of `games`."""
        self._stopped = time.perf_counter()
        self._bar.set_postfix_str(f"evaluating {games} games")

    def evaluated(self) -> None:
        """Tell of the run's last evaluation, and let the clock go on."""
        self._draw()
        last, best = self._run.evaluations[-1], self._best
        low, high = min(last.scores), max(last.scores)
        told = f"step {last.step:,}: mean score {last.mean:.1f} of {len(last.scores)} games, {low:g} to {high:g}"
        tqdm.write(f"{told}; best mean {best.mean:.1f} at step {best.step:,}", file=sys.stderr)
        self._bar.update(min(last.step, self._total) - self._bar.n)
        self._bar.set_postfix_str(f"evaluation {last.mean:.1f}, best {best.mean:.1f}")
        self._collect()
        if last.step > self._point[1]:
            self._add_point(last.step)
        for name, value in {"mean": last.mean, "least": low, "most": high}.items():
            self._curves.add_scalar(f"evaluation/{name}", value, last.step)
        self._curves.flush()
        self._paused += time.perf_counter() - self._stopped
        self._stopped = None

    def _draw(self) -> None:
        self._best = max(self._run.evaluations, key=lambda evaluation: evaluation.mean)
        draw_rewards(PICTURE, self._run.evaluations)

    def _clock(self) -> float:
        """Seconds of training."""
        return (self._stopped or time.perf_counter()) - self._paused

    def _collect(self) -> None:
        self._recent += [game.score for game in self._env.finished_games]
        self._games += self._env.finished_games
        self._env.finished_games.clear()

    def _words(self, loss: Tensor | None) -> str:
        (before, first), (now, step) = self._looks[0], self._looks[-1]
        rate = (step - first) / (now - before)
        left = timedelta(seconds=round(max(self._total - step, 0) / rate))
        games = f"games {np.mean(self._recent):.1f}" if self._recent else "no game over yet"
        scores = f"{games}, evaluation {self._run.evaluations[-1].mean:.1f}, best {self._best.mean:.1f}"
        learning = "warming up" if loss is None else f"loss {float(loss):.4f}"
        return f"{rate:,.0f} steps/s, {left} left, {scores}, {learning}, epsilon {self._agent.epsilon:.3f}"

    def _add_point(self, step: int) -> None:
        """Add what happened since the last point to the curves."""
        (before, first), self._point = self._point, (self._clock(), step)
        values = {"speed/steps_per_second": (step - first) / (self._point[0] - before)}
        values["learning/epsilon"] = self._agent.epsilon
        if learned := self._agent.read_statistics():
            values |= {f"learning/{name}": value for name, value in learned.items()}
            values |= {f"replay/{name}": value for name, value in self._memory.read_statistics().items()}
        for kind, episodes in {"game": self._games, "life": self._env.finished_lives}.items():
            if episodes:
                means = Episode(*np.mean(episodes, axis=0))
                values |= {f"{kind}/{name}": value for name, value in means._asdict().items()}
                episodes.clear()
        for tag, value in values.items():
            self._curves.add_scalar(tag, value, step)


def draw_rewards(path: Path, evaluations: list[Evaluation]) -> None:
    """Write a PNG of the scores over steps: their mean, middle half and range over the games; minutes on top."""
    steps, minutes = (np.array([getattr(each, name) for each in evaluations]) for name in ("step", "minutes"))
    low, lower, upper, high = np.array([np.percentile(each.scores, [0, 25, 75, 100]) for each in evaluations]).T
    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot(xlabel="steps", ylabel="score of a game")
    axes.fill_between(steps, low, high, color="C0", alpha=0.12, linewidth=0, label="least to most")
    axes.fill_between(steps, lower, upper, color="C0", alpha=0.3, linewidth=0, label="middle half of the games")
    axes.plot(steps, [each.mean for each in evaluations], color="C0", marker=".", label="mean")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)
    top = axes.twiny()
    top.set(xlim=axes.get_xlim(), xlabel="minutes")
    ticks = [tick for tick in MaxNLocator(6).tick_values(0, minutes[-1]) if minutes[0] <= tick <= minutes[-1]]
    top.set_xticks(np.interp(ticks, minutes, steps), [f"{tick:g}" for tick in ticks])
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=100))
