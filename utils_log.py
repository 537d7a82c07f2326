"""What a person sees of a run: what it is about to do, its bar, its curves, the picture of its scores, its end."""

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import utils_machine
from utils_config import command_line, count, play_command
from utils_drl import Agent
from utils_env import EPISODE_FRAMES, EVAL_FRAMES, AtariEnv, normalize_game
from utils_files import CURVES, PICTURE, REWARDS, model_name, write_whole
from utils_run import Run
from utils_types import Episode, Evaluation, best_of

SHOW_FREQ = 1_000  # steps between looks at how things stand; the device is idle then, so they cost next to nothing
POINT_FREQ = 10_000  # steps between points of the curves; an evaluation adds one, too
LINE_SECONDS = 30  # between the lines that stand for the bar where there is no terminal
RECENT = 100  # finished games of which the bar gives the mean score
LOOKS = 30  # over which the bar's rate is taken
SHORT = {  # words where a bar is narrow, so that 80 columns hold all of it
    " steps/s": "/s",
    "evaluation score": "eval",
    ", best": " best",
    ", training score": " train",
    ", epsilon": " eps",
}


def introduction(constants: dict, device: torch.device, room: str) -> str:
    """What is about to be done with `constants`, where, in what `room`, and how to stop it and go on."""
    machine = utils_machine.describe_device(device, constants["PRECISION"])
    game, steps, warm = normalize_game(constants["GAME"]), constants["MAX_STEPS"], constants["WARM_STEPS"]
    games, every = constants["NUM_ENVS"], constants["POLICY_UPDATE"]
    lines = [
        f"{game}: {steps:,} steps, {count(games, 'game')} in step, learning after {warm:,}",
        f"on {machine['device']}, {machine['precision']}",
        room,
        f"results: {REWARDS}, {PICTURE}, {constants['SAVE_PREFIX']}/",
        f"curves: tensorboard --logdir={CURVES} --load_fast=false",
        f"Ctrl-C stops the run at any time, and the same command goes on: {command_line()}",
    ]
    period = constants["CHECKPOINT_FREQ"] // games
    longest = min(constants["EVAL_FRAMES"], EPISODE_FRAMES)
    if constants["CHECKPOINT_FREQ"] < steps and period * constants["FRAME_SKIP"] < longest:
        told = f"every game starts anew after {count(period, 'step')} of its own, so its later part is never seen"
        lines.append(f"{told}: raise CHECKPOINT_FREQ, or lower NUM_ENVS")
    # An iteration more fills the memory, and from the next on there is an update every so many steps.
    end, warmed = (-(-each // games) * games for each in (steps, warm))
    if end // every <= (warmed + games) // every:
        told = f"MAX_STEPS ({steps:,}) ends before an update after WARM_STEPS ({warm:,})"
        lines.append(f"nothing will be learned: {told}")
    with contextlib.suppress(OSError):  # where no one counts
        load = os.getloadavg()[0]
        # The load is that of the whole machine, however little of it this process may use.
        if device.type == "cpu" and torch.get_num_threads() > 1 and load >= os.cpu_count() / 2:
            told = f"the processor was busy in the last minute (load {load:.1f})"
            lines.append(f"{told}: beside other programs --THREADS=1 is several times as fast")
    return "\n".join([*lines, "making the games, the networks and the memory"])


def conclusion(run: Run) -> str:
    """What came out of a finished `run`, and how to watch it."""
    last, best = run.evaluations[-1], best_of(run.evaluations)
    model, means = run.models / model_name(best.number), count(len(run.evaluations), "mean score")
    told = f"finished after {span(60 * last.minutes)}; the highest of {means} is {best.mean:.1f}, of {model}"
    return f"{told}; to watch it play:\n{play_command(model)}"


def columns(stream: TextIO) -> int | None:
    """The columns of the terminal that `stream` is, or None where it is none. Some programs make terminals with 0."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # no terminal, or no file at all
        return None


def span(seconds: float) -> str:
    """A time as one short word: 45s, 12m, 3.4h."""
    return f"{seconds:.0f}s" if seconds < 60 else f"{seconds / 60:.0f}m" if seconds < 3600 else f"{seconds / 3600:.1f}h"


class Curves:
    """The curves of a run that goes on at step `start`, in CURVES. Where they cannot be written, that is said once, and
    this start of the run goes on without them.
    """

    def __init__(self, start: int):
        # What an earlier start wrote after its checkpoint is hidden; a run's first step is that of an evaluation.
        purge_step = start + 1 if start else 0
        self._lost = False
        self._writer = self._try(
            lambda: SummaryWriter(str(CURVES), max_queue=1000, flush_secs=30, purge_step=purge_step)
        )

    def add(self, values: dict[str, float], step: int) -> None:
        """Add a point at `step` to each of these curves."""
        for tag, value in values.items():
            self._try(lambda tag=tag, value=value: self._writer.add_scalar(tag, value, step))

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Add a text, in Markdown."""
        self._try(lambda: self._writer.add_text(tag, text, step))

    def flush(self) -> None:
        """Let all that was added be seen."""
        self._try(lambda: self._writer.flush())

    def close(self) -> None:
        """Write the rest, and wait for the writer's thread."""
        self._try(lambda: self._writer.close())
        if self._lost and self._writer:
            with contextlib.suppress(OSError):
                self._writer.close()

    def _try(self, action: Callable[[], SummaryWriter | None]) -> SummaryWriter | None:
        if self._lost:
            return None
        try:
            return action()
        except OSError as error:  # also that of the writer's thread
            self._lost = True
            tqdm.write(
                f"cannot write {CURVES}: {error.strerror}; going on without them until the next start", file=sys.stderr
            )


class Log:
    """The bar, the curves and the picture of `run`, which goes on at step `start`; a context.

    Where stderr is no terminal, or one without columns, a line every LINE_SECONDS stands for the bar. Time in a `pause`
    is no one's.
    """

    def __init__(self, run: Run, env: AtariEnv, agent: Agent, memory, start: int):
        self._run, self._env, self._agent, self._memory = run, env, agent, memory
        self._total, self._warm_steps = run.constants["MAX_STEPS"], run.constants["WARM_STEPS"]
        self._has_learned = len(memory) >= self._warm_steps  # before this start
        self._heading = heading(run.constants)
        self._curves = Curves(start)
        if run.evaluations:
            self._take_in()
        rows = (f"| {name} | {value} |" for name, value in run.constants.items())
        self._curves.add_text("constants", "\n".join(["| constant | value |", "|---|---|", *rows]), start)
        done = min(start, self._total)
        flat = columns(sys.stderr) == 0 or None  # None leaves it to tqdm: no bar where there is no terminal
        form = "{percentage:.1f}% {desc} |{bar}|"  # what does not fit is cut off: first the bar
        self._bar = tqdm(total=self._total, initial=done, bar_format=form, dynamic_ncols=True, disable=flat)
        self._line_due = 0.0
        self._paused, self._stopped = 0.0, None  # seconds of pauses, and when the one that is going on began
        self._looks = [deque(maxlen=LOOKS), deque(maxlen=LOOKS)]  # of warming up, and of learning
        self._loss: Tensor | None = None
        self._point = (self._clock(), start)
        self._games: list[Episode] = []  # since the last point
        self._recent = deque(maxlen=RECENT)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
        self._curves.close()

    def show(self, step: int, loss: Tensor | None) -> None:
        """Say how things stand at `step`, with the last `loss`, and draw the curves on. Waits for the device."""
        self._loss = loss
        self._looks[loss is not None].append((self._clock(), step))
        self._collect()
        if not self._bar.disable or time.monotonic() >= self._line_due:
            self._say(step, self._words())
            self._line_due = time.monotonic() + LINE_SECONDS
        if step // POINT_FREQ > self._point[1] // POINT_FREQ:
            self._add_point(step)

    @contextlib.contextmanager
    def pause(self, step: int, doing: str) -> Iterator[None]:
        """After `step`, be `doing` something else than training: say so, and let the clock stand still."""
        self._say(step, doing)
        self._stopped = time.perf_counter()
        yield
        self._paused += time.perf_counter() - self._stopped
        self._stopped = None
        if not self._bar.disable:
            self._say(step, self._words())

    def tell_evaluation(self) -> None:
        """Tell of the run's last evaluation."""
        self._take_in()
        last, best = self._run.evaluations[-1], self._best
        games, low, high = count(len(last.scores), "game"), min(last.scores), max(last.scores)
        told = f"step {last.step:,}: mean score {last.mean:.1f} of {games}, {low:,.10g} to {high:,.10g}"
        tqdm.write(f"{told}; best mean {best.mean:.1f} at step {best.step:,}", file=sys.stderr)
        means = {"evaluation/mean": last.mean, "evaluation/least": low, "evaluation/most": high}
        self._curves.add(means, last.step)
        self._curves.flush()

    def _take_in(self) -> None:
        """Draw the run's evaluations, and keep the best, for which the bar asks again and again."""
        self._best = best_of(self._run.evaluations)
        try:
            draw_rewards(PICTURE, self._run.evaluations, self._heading)
        except OSError as error:
            tqdm.write(f"cannot write {PICTURE}: {error.strerror}; going on without it", file=sys.stderr)

    def _clock(self) -> float:
        """Seconds of training."""
        return (self._stopped or time.perf_counter()) - self._paused

    def _collect(self) -> None:
        self._recent += [game.score for game in self._env.finished_games]
        self._games += self._env.finished_games
        self._env.finished_games.clear()

    def _say(self, step: int, words: str) -> None:
        """Tell it in the bar, or in a line."""
        if self._bar.disable:
            print(f"step {min(step, self._total):,} of {self._total:,}: {words}", file=sys.stderr)
            return
        self._bar.n = min(step, self._total)
        self._bar.set_description_str(fit(words, (columns(sys.stderr) or 80) - len("100.0% ") - 1))

    def _words(self) -> str:
        """How things stand: what is most asked for first."""
        looks, words = self._looks[self._loss is not None], []
        if len(looks) > 1:  # the first only starts the clock, because what had to be set up before it is no training
            (before, first), (now, step) = looks[0], looks[-1]
            rate = (step - first) / (now - before)
            words.append(f"{rate:,.0f} steps/s")
        if (warm := len(self._memory) / self._warm_steps) < 1:
            words.append(f"warming up {warm:.0%}")
        elif self._loss is None or not words:
            words.append("learning goes on" if self._has_learned else "learning starts")
        else:
            words.append(f"{span(max(self._total - step, 0) / rate)} left")
        scores = {"evaluation score": self._run.evaluations[-1].mean, "best": self._best.mean}
        if self._recent:
            scores["training score"] = np.mean(self._recent)
        words += [f"{name} {score:.{1 if abs(score) < 1000 else 0}f}" for name, score in scores.items()]
        if self._loss is not None:
            words.append(f"loss {float(self._loss):.4f}")
        return ", ".join([*words, f"epsilon {self._agent.epsilon:.2f}"])

    def settle(self, step: int) -> None:
        """Add a point, before what may be a checkpoint after `step`: nothing that happened since the last is saved."""
        self._collect()
        if step > self._point[1]:
            self._add_point(step)
        self._agent.read_statistics()  # of the one iteration after a point at this very step
        self._games.clear()
        self._env.finished_lives.clear()
        self._curves.flush()

    def _add_point(self, step: int) -> None:
        """Add what happened since the last point to the curves."""
        (before, first), self._point = self._point, (self._clock(), step)
        values = {"speed/steps_per_second": (step - first) / (self._point[0] - before)}
        values |= {f"learning/{name}": getattr(self._agent, name) for name in ("epsilon", "learning_rate")}
        if learned := self._agent.read_statistics():
            values |= {f"learning/{name}": value for name, value in learned.items()}
            values |= {f"replay/{name}": value for name, value in self._memory.read_statistics().items()}
        for kind, episodes in {"game": self._games, "life": self._env.finished_lives}.items():
            if episodes:
                means = Episode(*np.mean(episodes, axis=0))
                values |= {f"{kind}/{name}": value for name, value in means._asdict().items()}
                episodes.clear()
        self._curves.add(values, step)


def fit(words: str, room: int) -> str:
    """`words` in `room` columns: in short words, and then without the last ones, where they need more."""
    if len(words) > room:
        for long, short in SHORT.items():
            words = words.replace(long, short)
    while len(words) > max(room, 0):
        words = words.rpartition(", ")[0]
    return words


def heading(constants: dict) -> str:
    """What is measured with `constants`: the game, how its score comes about, and the options that are on."""
    options = [name for name in ("PRIORITIZED", "DOUBLE_DQN", "DUELING", "LAYER_NORM") if constants[name]]
    least = {"N_STEP": 1, "QUANTILES": 1, "ATOMS": 1, "AVERAGE_STEPS": constants["POLICY_UPDATE"]}  # what is off
    options += [f"{name}={constants[name]}" for name, off in least.items() if constants[name] > off]
    options += [f"V_MAX={constants['V_MAX']:g}"] * (constants["ATOMS"] > 1)
    options.append(f"SEED={constants['SEED']}")
    games = f"{count(constants['EVAL_EPISODES'], 'game')} per evaluation, epsilon {constants['EVAL_EPS']:g}"
    if sticky := constants["REPEAT_ACTION_PROBABILITY"]:
        games += f", actions repeat with {sticky:g}"
    if constants["FULL_ACTION_SPACE"]:
        games += ", all 18 actions"
    if (frames := constants["EVAL_FRAMES"]) != EVAL_FRAMES:
        games += f", at most {frames:,} frames"
    return f"{normalize_game(constants['GAME'])}: {games}\n{', '.join(options)}"


def draw_rewards(path: Path, evaluations: list[Evaluation], title: str) -> None:
    """Write a PNG of the scores over steps: their mean, middle half and range over the games; minutes on top."""
    steps, minutes = (np.array([getattr(each, name) for each in evaluations]) for name in ("step", "minutes"))
    low, lower, upper, high = np.array([np.percentile(each.scores, [0, 25, 75, 100]) for each in evaluations]).T
    figure = Figure(figsize=(8, 5))
    figure.suptitle(title, fontsize="medium")
    # Room for scores of millions; a layout engine, which would find it, takes as long as all the rest.
    axes = figure.add_axes((0.13, 0.19, 0.84, 0.61), xlabel="steps", ylabel="score of a game")
    axes.yaxis.set_major_formatter(lambda score, _: f"{score:,.10g}")
    axes.fill_between(steps, low, high, color="C0", alpha=0.12, linewidth=0, label="least to most")
    axes.fill_between(steps, lower, upper, color="C0", alpha=0.3, linewidth=0, label="middle half of the games")
    axes.plot(steps, [each.mean for each in evaluations], color="C0", marker=".", label="mean")
    marks = ticks(steps[0], steps[-1])
    axes.set_xticks(marks, [f"{mark:,.0f}" for mark in marks])
    axes.grid(alpha=0.3)
    figure.legend(loc="lower center", ncols=3, frameon=False)
    top = axes.twiny()
    top.set(xlim=axes.get_xlim(), xlabel="minutes")
    marks = ticks(minutes[0], minutes[-1])
    top.set_xticks(np.interp(marks, minutes, steps), [f"{mark:g}" for mark in marks])
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=100))


def ticks(first: float, last: float) -> list[float]:
    """A few round numbers from `first` to `last`, or else just the last."""
    marks = MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(0, last)
    return [mark for mark in marks if first <= mark <= last] or [round(last, 1)]
