"""One game of a trained model, to watch: its screen, and beside it what the network expects of every action."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils_config import ConfigError, Stopped, out_of_memory
from utils_drl import Agent
from utils_env import FRAMES_PER_SECOND, AtariEnv, save_animation
from utils_files import models_in, write_whole

MOVIE = Path("play.gif")
WIDTH, HEIGHT, PANEL, MARGIN = 640, 420, 300, 16  # pixels of the screen in it, and beside that
TRACE = 134  # steps of the curve in it
BACK, TEXT, FAINT, BAR = (16, 16, 24), (255, 255, 255), (144, 144, 160), (72, 80, 112)  # colours
CHOSEN, POINTS = (240, 112, 32), (255, 208, 64)  # of the action, and of the score and of what added to it


class Watched:
    """An agent, with the Q values of all that it sees and the actions that it chooses."""

    def __init__(self, agent: Agent):
        self._agent = agent
        self.values: list[np.ndarray] = []
        self.actions: list[int] = []

    def run(self, states: Tensor, **options) -> np.ndarray:
        """As the agent's, for one game."""
        actions = self._agent.run(states, **options)
        self.values.append(self._agent.values(states)[0].cpu().numpy())
        self.actions.append(int(actions[0]))
        return actions


def play(path: str, device: torch.device, dtype: torch.dtype, epsilon: float, max_frames: int, seed: int) -> None:
    """Play a game with the model at `path` and write it, beside its Q values, as MOVIE. Raises Stopped."""
    path = os.path.expanduser(path)
    if Path(path).name.startswith("checkpoint_"):
        raise ConfigError(f"{path} is a checkpoint, from which a run goes on; models are called model_000 and so on")
    try:
        agent, about = Agent.from_model(path, device, dtype=dtype, graphs=False)
        env = AtariEnv(num_envs=1, device=device, graphs=False, **about["rules"])
        if env.get_action_dim() != agent.action_dim:
            raise ValueError(f"{path} knows {agent.action_dim} actions, {env.game} has {env.get_action_dim()}")
        title = f"{Path(path).name}, {about['step']:,} steps of training"
    except OSError as error:
        there = [*models_in(Path(path).parent)] if isinstance(error, FileNotFoundError) else []
        hint = f"; the last one there is {there[-1]}" if there else ""
        raise ConfigError(f"cannot read {path}: {error.strerror}{hint}") from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:  # whatever strange values lead to
        if out_of_memory(error):
            raise
        raise ConfigError(f"{path} does not say for which game and network it is") from None
    print(f"{path}: playing a game of {env.game}", file=sys.stderr)
    watched = Watched(agent)
    (score,) = env.evaluate(watched, 1, epsilon, seed, max_frames=max_frames, record=True)
    print(f"score {score:,.10g}, writing {len(watched.values)} pictures", file=sys.stderr)
    before = signal.getsignal(signal.SIGINT)
    try:
        if before == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # or it would leave half a file
        write_whole(MOVIE, lambda file: save_animation(file, pictures(env, watched, title), env.frame_skip))
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}") from None
    except KeyboardInterrupt:
        raise Stopped(f"stopped by SIGINT, {MOVIE} is not written", 128 + signal.SIGINT) from None
    finally:
        signal.signal(signal.SIGINT, before)
    print(f"{MOVIE} is written", file=sys.stderr)


def pictures(env: AtariEnv, watched: Watched, title: str) -> Iterator[Image.Image]:
    """The recorded game, each screen beside the values that the agent gave its actions and the one it chose, and the
    largest value and the points of the last TRACE steps."""
    names, values = env.get_action_meanings(), np.array(watched.values)
    left, right = WIDTH + MARGIN, WIDTH + PANEL - MARGIN
    row = min(30, 230 // len(names))
    bars = HEIGHT - MARGIN // 2 - row * len(names)  # where they begin
    top, bottom = 96, bars - MARGIN  # of the curve
    lengths = np.interp(values, [values.min(), values.max()], [0, right - left - 156])
    best = values.max(axis=1)
    heights = np.interp(best, [best.min(), best.max()], [bottom, top])
    small, medium, large, huge = (ImageFont.load_default(size) for size in (13, min(row - 2, 16), 20, 30))
    caption = f"largest Q value, last {TRACE * env.frame_skip / FRAMES_PER_SECOND:.0f} s"
    scores = []
    for step, ((frame, score), chosen) in enumerate(zip(env.get_recording(), watched.actions, strict=True)):
        scores.append(score)
        picture = Image.new("RGB", (WIDTH + PANEL, HEIGHT), BACK)
        picture.paste(Image.fromarray(frame).resize((WIDTH, HEIGHT), Image.Resampling.NEAREST))
        pen = ImageDraw.Draw(picture)
        pen.text((left, 40), env.game, TEXT, large, anchor="ls")
        pen.text((right, 40), f"{score:,.10g}", POINTS, huge, anchor="rs")
        pen.text((left, 64), title, FAINT, small, anchor="ls")
        pen.text((left, 84), caption, FAINT, small, anchor="ls")
        shown = range(max(step - TRACE, 0), step + 1)
        for past in shown[1:]:
            if scores[past] != scores[past - 1]:
                x = right - 2 * (step - past)
                pen.line((x, top, x, bottom), POINTS)
        pen.line([(right - 2 * (step - past), heights[past]) for past in shown], TEXT, 2)
        for number, name in enumerate(names):
            y, colours = bars + row * number, (CHOSEN, CHOSEN) if number == chosen else (TEXT, BAR)
            pen.text((left, y + row // 2), name, colours[0], medium, anchor="lm")
            pen.rectangle((left + 110, y + 2, left + 110 + lengths[step, number], y + row - 3), colours[1])
            pen.text((right, y + row // 2), f"{values[step, number]:.2f}", TEXT, medium, anchor="rm")
        yield picture
