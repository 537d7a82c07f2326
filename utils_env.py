"""AtariEnv: many Atari games in step as stacks of 84x84 frames, with lives, rewards and ends as DQN wants them."""

import difflib
import pathlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import BinaryIO

import numpy as np
import torch
from ale_py import ALEInterface, LoggerMode, roms
from ale_py.vector_env import AtariVectorEnv
from PIL import Image
from torch import Tensor

from utils_graph import Graphs
from utils_types import FRAME_SHAPE, Episode, Transition

TWO_PLAYERS_ONLY = ("combat", "joust", "maze_craze", "warlords")  # the vectoriser ends the process over these
EPISODE_FRAMES = 108_000  # a training game's limit, half an hour
EVAL_FRAMES = 18_000  # an evaluation game's limit, five minutes
PIXELS = FRAME_SHAPE[0] * FRAME_SHAPE[1]
COLUMNS = 4  # float32 numbers that travel beside a game's frame: action, reward, terminal, age
LEAST_FRAMES = 40  # of any limit: a game's clock starts after up to 30 no-ops, and must be seen to fall at its restart
FRAMES_PER_SECOND = 60
LUMA = np.array([0.299, 0.587, 0.114])  # of red, green and blue (ITU-R BT.601)


def normalize_game(name: str) -> str:
    """The ROM's name for any usual spelling: Ms. Pac-Man, ALE/MsPacman-v5, MsPacmanNoFrameskip-v4, ms_pacman.

    Raises ValueError for one that ale-py does not ship, naming those that are near, or that needs two players.
    """
    games = sorted(set(roms.get_all_rom_ids()) - set(TWO_PLAYERS_ONLY))
    squeezed = {game.replace("_", ""): game for game in games}
    plain = name.split("/")[-1].split("-v")[0].split("-ram")[0]
    for suffix in ("NoFrameskip", "Deterministic"):
        plain = plain.removesuffix(suffix)
    plain = "".join(filter(str.isalnum, plain.lower()))
    if plain in squeezed:
        return squeezed[plain]
    if plain in (game.replace("_", "") for game in TWO_PLAYERS_ONLY):
        raise ValueError(f"the game {name!r} needs two players")
    if not plain:
        raise ValueError("the name of the game is empty")
    near = [repr(squeezed[match]) for match in difflib.get_close_matches(plain, squeezed)]
    raise ValueError(f"there is no game {name!r}" + (f"; is it {' or '.join(near)}?" if near else ""))


class AtariEnv:
    """`num_envs` games of one ROM, advanced together by the emulators' own threads.

    - A lost life is terminal for learning, but the game goes on; without `terminal_on_life_loss` only a game's end is.
    - Rewards are clipped to [-1, 1]; raw scores are kept.
    - FIRE is pressed for the agent after a reset (by the vectoriser) and after a lost life, if it is among the actions;
      without it Breakout never serves the next ball. The transition names the action that was really executed.
    - The row after a game's end is the first of the next game: its action was ignored and its age is 0.
    - A stack never mixes two games; where a game has no earlier frames it is black.

    `send` and `recv` are the halves of `step`: between them the emulators work and the caller is free to do so too.

    With `graphs`, on a GPU, what happens there in a step is a CUDA graph. On a GPU, what `reset` and `step` return is
    valid until the next of them; on other devices it is not touched again.

    `repeat_action_probability` and `full_action_space` are ale-py's: the chance that an emulator frame repeats the last
    action instead (sticky actions, Machado et al. 2018, section 5.2), and all 18 actions in place of the game's own.
    `rules` are the arguments by which such games are made again for an agent to play, not to learn from: to be saved
    with one.

    Raises ValueError for a game that is none or needs two players, and for sizes that are too small.
    """

    def __init__(
        self,
        game: str,
        num_envs: int,
        device: torch.device | str = "cpu",
        *,
        stack_size: int = 4,
        frame_skip: int = 4,
        repeat_action_probability: float = 0.0,
        full_action_space: bool = False,
        terminal_on_life_loss: bool = True,
        num_threads: int = 0,
        max_frames: int = EPISODE_FRAMES,
        graphs: bool = True,
    ):
        if num_envs < 1:
            raise ValueError(f"there must be at least 1 game, not {num_envs}")
        if max_frames < LEAST_FRAMES:
            raise ValueError(f"a game's limit must be at least {LEAST_FRAMES} frames, not {max_frames}")
        self.game, self.num_envs, self.device = normalize_game(game), num_envs, torch.device(device)
        self.stack_size, self.frame_skip, self.num_threads = stack_size, frame_skip, num_threads
        self._terminal_on_life_loss = terminal_on_life_loss
        self.rules = {
            "game": self.game,
            "stack_size": stack_size,
            "frame_skip": frame_skip,
            "repeat_action_probability": repeat_action_probability,
            "full_action_space": full_action_space,
        }
        self._emulators = _make_emulators(
            self.rules,
            num_envs,
            max_frames,
            num_threads=min(num_threads, num_envs),
            # episodic_life would restart the game at a lost life and hide the later lives' states.
            life_loss_info=terminal_on_life_loss,
        )
        self._meanings = [action.name for action in self._emulators.ale.get_action_set()]
        self._fire = self._meanings.index("FIRE") if "FIRE" in self._meanings else None
        self._in_flight = False
        self._lives = 0  # at the start of a game
        self._graphs = Graphs(self.device, graphs)
        self._states = torch.zeros(num_envs, stack_size, *FRAME_SHAPE, dtype=torch.uint8, device=self.device)
        if self.device.type == "cuda":  # pinned, so that an upload needs no wait, and to where a graph finds it
            self._outgoing = torch.empty(num_envs, PIXELS + 4 * COLUMNS, dtype=torch.uint8, pin_memory=True)
            self._incoming = self._outgoing.to(self.device)
            self._arrival = torch.cuda.Event()
        self._replay: Iterator[tuple[np.ndarray, float]] = iter(())
        self._evaluations: dict[tuple[int, int], AtariEnv] = {}
        self.finished_games: list[Episode] = []  # as they end, for the caller to read and clear
        self.finished_lives: list[Episode] = []  # the same

    def get_action_dim(self) -> int:
        """The number of actions: those that the game uses, or 18."""
        return len(self._meanings)

    def get_action_meanings(self) -> list[str]:
        """What each action presses, in the order of the action numbers."""
        return list(self._meanings)

    def get_eval_lives(self) -> int:
        """Lives at the start of a game, 0 in games that have none. Known after the first reset."""
        return self._lives

    def reset(self, seed: int | list[int]) -> tuple[Tensor, Transition]:
        """Start every game anew, each with a seed drawn from `seed`; return states [N, S, 84, 84] and the first row."""
        if self._in_flight:
            self.recv()  # the vectoriser would answer the reset with this step
        self._seeds = np.random.SeedSequence(seed).generate_state(self.num_envs) >> 1  # the vectoriser takes 31 bits
        frames, info = self._emulators.reset(seed=self._seeds.astype(np.int64))
        self._lives_left = info["lives"]
        self._lives = int(self._lives_left[0])
        self._clock = info["episode_frame_number"]
        self._ages = np.zeros(self.num_envs, np.int64)
        self._totals = np.zeros((2, len(Episode._fields), self.num_envs))  # of the running games and of their lives
        self._terminals = np.zeros(self.num_envs, bool)
        self._lost = np.zeros(self.num_envs, bool)  # the games that have just lost a life
        self._actions = np.zeros(self.num_envs, np.int64)
        return self._row(frames, np.zeros(self.num_envs))

    def send(self, actions: np.ndarray) -> None:
        """Start one step of every game. Raises ValueError for actions that are not one legal number per game."""
        actions = np.array(actions)
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            raise ValueError(
                f"{self.num_envs} games need {self.num_envs} whole numbers as actions, "
                f"not {actions.dtype} {list(actions.shape)}"
            )
        actions = actions.astype(np.int64)
        illegal = (actions < 0) | (actions >= len(self._meanings))
        if illegal.any():  # it would hang the emulators for ever
            wrong = actions[illegal][0]
            raise ValueError(f"an action of {self.game} is from 0 to {len(self._meanings) - 1}, not {wrong}")
        if self._fire is not None and self._lives:
            actions[self._lost] = self._fire
        if self._fire is not None and self.rules["repeat_action_probability"]:
            # The vectoriser presses it for a single frame, which may have repeated the action before.
            actions[self._ages == 0] = self._fire
        self._actions = actions
        self._in_flight = True
        self._emulators.send(actions)

    def recv(self) -> tuple[Tensor, Transition]:
        """Wait for the step that `send` started; return the states [N, S, 84, 84] after it and its row."""
        if not self._in_flight:
            raise RuntimeError("nothing to receive: call send first")
        frames, rewards, self._terminals, _, info = self._emulators.recv()
        self._in_flight = False
        # A game's own clock falls only when it restarts. Flags and lives do not tell: a life lost at the frame limit
        # reports neither truncation nor the last life, and some games play their last life with none left.
        restarted = info["episode_frame_number"] < self._clock
        self._clock = info["episode_frame_number"]
        self._lost = ~restarted & (self._terminals | (info["lives"] < self._lives_left))
        self._lives_left = info["lives"]
        if self._terminal_on_life_loss:  # the vectoriser tells of no life after which none is left but the game goes on
            self._terminals = self._terminals | self._lost
        self._ages = np.where(restarted, 0, np.minimum(self._ages + 1, max(self.stack_size - 1, 1)))
        clipped = np.clip(rewards, -1, 1)
        self._note(rewards, clipped, restarted)
        return self._row(frames, clipped)

    def step(self, actions: np.ndarray) -> tuple[Tensor, Transition]:
        """`send` and `recv` in one."""
        self.send(actions)
        return self.recv()

    def _note(self, rewards: np.ndarray, clipped: np.ndarray, restarted: np.ndarray) -> None:
        """Count the step, which is none of those that `restarted`, and note the games and lives that have ended."""
        games, lives = self._totals
        self._ended = np.flatnonzero(restarted)
        if len(self._ended):
            self.finished_games += _take(games, restarted)
            steps = lives[Episode._fields.index("steps")]
            self.finished_lives += _take(lives, restarted & (steps > 0))  # cut short by the limit
        for row, gains in enumerate((rewards, clipped, ~restarted)):
            self._totals[:, row] += gains
        if self._lost.any():
            self.finished_lives += _take(lives, self._lost)

    def _row(self, frames: np.ndarray, rewards: np.ndarray) -> tuple[Tensor, Transition]:
        table = np.stack([self._actions, rewards, self._terminals, self._ages], axis=1).astype(np.float32)
        uploaded = self._upload(frames.reshape(self.num_envs, PIXELS), table)
        self._graphs("row", partial(self._unpack, *uploaded))
        return self._states, self._newest

    def _upload(self, frames: np.ndarray, table: np.ndarray) -> tuple[Tensor, Tensor]:
        """`frames` [N, H * W] and the float32 `table` [N, n] on the device: to a GPU by one upload, without a wait."""
        if self.device.type != "cuda":
            return torch.from_numpy(frames).to(self.device), torch.from_numpy(table).to(self.device)
        # The last upload is over, since its states have been acted on, unless all actions were random.
        self._arrival.synchronize()
        np.concatenate([frames, table.view(np.uint8)], axis=1, out=self._outgoing.numpy())
        self._incoming.copy_(self._outgoing, non_blocking=True)
        self._arrival.record(torch.cuda.current_stream(self.device))
        return self._incoming[:, :PIXELS], self._incoming[:, PIXELS:].view(torch.float32)

    def _unpack(self, frames: Tensor, table: Tensor) -> Tensor:
        """Make the newest row of what was uploaded, and move the states on to it."""
        frames = frames.view(-1, *FRAME_SHAPE)
        actions, rewards, terminals, ages = table.t()
        self._newest = Transition(frames, actions.long(), rewards.contiguous(), terminals.bool(), ages.long())
        earlier = self._states[:, 1:] * (self._newest.ages > 0)[:, None, None, None]  # a new game has no earlier frames
        states = torch.cat([earlier, frames[:, None]], dim=1)
        # A graph finds the states where it left them.
        self._states = self._states.copy_(states) if self._graphs.in_use else states
        return self._states

    def evaluate(
        self,
        agent,
        episodes: int,
        epsilon: float,
        seed: int | list[int],
        *,
        max_frames: int = EVAL_FRAMES,
        record: bool = False,
    ) -> np.ndarray:
        """Raw scores [episodes] of whole games (all lives), played side by side with `agent.run` at `epsilon`.

        The games start with up to 30 random no-ops and end after `max_frames` frames. They have emulators and random
        numbers of their own, from `seed`: training goes on as if nothing had happened. With `record`,
        `get_recording` then plays the first of them again. Raises ValueError for less than one game.
        """
        if episodes < 1:
            raise ValueError(f"an evaluation needs at least 1 game, not {episodes}")
        games = self._evaluation_games(episodes, max_frames)
        rng = np.random.default_rng(seed)
        scores = np.full(episodes, np.nan)
        played = []
        states, _ = games.reset(seed)
        games.finished_games.clear()  # of an evaluation that was interrupted
        while np.isnan(scores).any():
            games.send(agent.run(states, epsilon=epsilon, rng=rng))
            if np.isnan(scores[0]):
                played.append(games._actions[0])
            states, _ = games.recv()
            for game, ended in zip(games._ended, games.finished_games, strict=True):
                if np.isnan(scores[game]):  # a game that is over starts again and plays on, uncounted
                    scores[game] = ended.score
            games.finished_games.clear()
        games.finished_lives.clear()
        if record:
            self._replay = _replay(self.rules, max_frames, games._seeds[0], played[:-1])
        return scores

    def _evaluation_games(self, episodes: int, max_frames: int) -> "AtariEnv":
        """Emulators for evaluations, kept from one to the next: a reset makes them as good as new."""
        if (episodes, max_frames) not in self._evaluations:
            self._evaluations[episodes, max_frames] = AtariEnv(
                num_envs=episodes,
                device=self.device,
                num_threads=self.num_threads,
                max_frames=max_frames,
                graphs=self._graphs.in_use,
                **self.rules,
            )
        return self._evaluations[episodes, max_frames]

    def get_frame(self) -> np.ndarray | None:
        """The next true-colour frame [H, W, 3] uint8 of the recorded game, one per step; None after the last.

        It is what the console draws, of the last two frames of a step the brighter pixels: 160 columns, and 210 rows in
        most games, up to 250 in some.
        """
        frame, _ = next(self._replay, (None, 0.0))
        return frame

    def get_recording(self) -> Iterator[tuple[np.ndarray, float]]:
        """What `get_frame` has yet to show, each frame with the score that the game then has."""
        return self._replay

    def save_recording(self, directory: str | pathlib.Path) -> None:
        """Write the recorded game as `directory`/000000.png ... and, beside it, as the animation `directory`.gif.

        Raises ValueError if no evaluation was recorded since the last time.
        """
        directory = pathlib.Path(directory)

        def screens() -> Iterator[Image.Image]:
            for number, (frame, _) in enumerate(self._replay):
                directory.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(frame)
                image.save(directory / f"{number:06d}.png")
                yield widen(image)

        save_animation(directory.with_suffix(".gif"), screens(), self.frame_skip)


def widen(screen: Image.Image) -> Image.Image:
    """The screen with square pixels, as a television shows it: twice as wide."""
    return screen.resize((2 * screen.width, screen.height), Image.Resampling.NEAREST)


def save_animation(file: pathlib.Path | BinaryIO, images: Iterable[Image.Image], frame_skip: int) -> None:
    """Write `images`, one per step, as a GIF at the game's own speed. Raises ValueError if there are none."""
    # An Atari shows at most 128 colours, so a palette loses nothing.
    frames = (image.quantize(256, dither=Image.Dither.NONE) for image in images)
    first = next(frames, None)
    if first is None:
        raise ValueError("nothing to write: no evaluation was recorded since the last time")
    duration = round(1000 * frame_skip / FRAMES_PER_SECOND, -1)  # GIF counts hundredths of a second
    first.save(file, "GIF", save_all=True, append_images=frames, duration=duration, loop=0)


def _take(totals: np.ndarray, ended: np.ndarray) -> list[Episode]:
    """The totals [3, N] of those that `ended` [N], which begin anew."""
    episodes = [Episode(*values) for values in totals[:, ended].T.tolist()]
    totals[:, ended] = 0
    return episodes


def _make_emulators(rules: dict, num_envs: int, max_frames: int, **options) -> AtariVectorEnv:
    """Emulators of `num_envs` games by the `rules` of an AtariEnv, each at most `max_frames` frames long."""
    return AtariVectorEnv(
        rules["game"],
        num_envs,
        max_num_frames_per_episode=max_frames,
        frameskip=rules["frame_skip"],
        repeat_action_probability=rules["repeat_action_probability"],
        full_action_space=rules["full_action_space"],
        stack_num=1,  # stacks are built where the agent is, from frames that travel once
        reward_clipping=False,  # clipping inside would lose the score
        **options,
    )


def _screen_size(game: str) -> tuple[int, int]:
    """Rows and columns of the screen of the ROM `game`."""
    ALEInterface.setLoggerMode(LoggerMode.Error)
    console = ALEInterface()
    console.loadROM(roms.get_rom_path(game))
    return console.getScreenDims()


def _replay(rules: dict, max_frames: int, seed: int, actions: list[int]) -> Iterator[tuple[np.ndarray, float]]:
    """The game that `seed` starts and `actions` play, in true colour, with its score: an emulator is deterministic."""
    height, width = _screen_size(rules["game"])
    # Any other size would mix colours, and so would the vectoriser's maximum of two frames, which is one per channel.
    colours = {"grayscale": False, "img_height": height, "img_width": width, "maxpool": False}
    screen = _make_emulators(rules | {"frame_skip": 1}, 1, max_frames, num_threads=1, **colours)
    frames, _ = screen.reset(seed=int(seed))
    score = 0.0
    yield frames[0, 0], score
    for action in actions:
        last = []
        for _ in range(rules["frame_skip"]):
            frames, rewards, terminated, truncated, _ = screen.step(np.array([action]))
            score += float(rewards[0])
            last = [*last[-1:], frames[0, 0]]
            if terminated[0] or truncated[0]:
                break
        brightness = [frame @ LUMA for frame in last]  # the brighter pixels, against flicker, as the agent sees them
        yield np.where((brightness[0] > brightness[-1])[..., None], last[0], last[-1]), score
