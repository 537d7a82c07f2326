"""AtariEnv held against the emulator itself: ALE's own vectoriser, and single games of the plain ALE interface.

The plain games know nothing of vectors, stacks or wrappers, so what they say about scores, ends and pictures is the
truth that AtariEnv has to tell.
"""

import hashlib
import itertools

import ale_py
import gymnasium
import numpy as np
import pytest
import torch
from ale_py import ALEInterface, LoggerMode, roms
from ale_py.vector_env import AtariVectorEnv
from PIL import Image

from utils_drl import Agent
from utils_env import AtariEnv, normalize_game

ALEInterface.setLoggerMode(LoggerMode.Error)
NOOP, FIRE, RIGHT, LEFT = range(4)  # of Breakout


@pytest.fixture
def starts(monkeypatch):
    """A list to which each reset of any vector of emulators adds its (seeds, frames already played) per game."""
    seen, reset = [], AtariVectorEnv.reset

    def watched(self, *, seed=None, options=None):
        frames, info = reset(self, seed=seed, options=options)
        seeds = np.arange(seed, seed + self.num_envs) if isinstance(seed, int) else np.array(seed)
        seen.append((seeds, info["episode_frame_number"].copy()))
        return frames, info

    monkeypatch.setattr(AtariVectorEnv, "reset", watched)
    return seen


class PlainGame:
    """One game on the plain ALE interface, frame by frame, begun as a vector's game whose clock stands at `clock`.

    `draw` names what `picture` shows of it: "getScreenGrayscale", "getScreenRGB" or nothing.
    """

    def __init__(self, game, clock, draw=None, frame_skip=4, max_frames=10**9):
        self.ale = ALEInterface()
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.loadROM(roms.get_rom_path(game))
        self.buttons = self.ale.getMinimalActionSet()
        names = [button.name for button in self.buttons]
        self.fire = names.index("FIRE") if "FIRE" in names else None
        self.frame_skip, self.frames_left = frame_skip, max_frames
        presses = [names.index("NOOP")] * clock
        if self.fire is not None:
            presses[0] = self.fire
        for press in presses:
            self.ale.act(self.buttons[press])
        self.score, self.lost_life, self.over = 0.0, False, False
        self.screen = getattr(self.ale, draw) if draw else None
        self.picture = self.screen() if draw else None
        self.drawn = [self.picture]

    def step(self, action):
        """Play `action` for a step, or FIRE if the last step lost a life."""
        if self.lost_life and self.fire is not None:
            action = self.fire
        lives, screens = self.ale.lives(), []
        for frame in range(self.frame_skip):
            self.score += self.ale.act(self.buttons[action])
            self.frames_left -= 1
            self.over = self.ale.game_over() or self.frames_left == 0
            if self.over:  # ALE's vectors do not draw a game's last screen: older ones stay in the picture
                break
            if self.screen:
                self.drawn = [self.drawn[-1], self.screen()]
            if self.screen and frame >= self.frame_skip - 2:
                screens.append(self.drawn[-1])
        self.lost_life = self.ale.lives() < lives
        if self.screen:
            self.picture = np.maximum.reduce(screens if len(screens) == 2 else [self.picture, *screens])


class ScriptedAgent:
    """Plays given actions, one for all games or one per game, and remembers what it was asked."""

    def __init__(self, actions):
        self.actions, self.calls, self.states = actions, [], []

    def run(self, states, training=False, *, epsilon=None, rng=None):
        action = self.actions[len(self.calls)]
        self.calls.append((training, epsilon, rng))
        self.states.append(states.clone())
        return np.full(len(states), action)


class RandomAgent:
    """Plays at random from the stream it is given, and remembers the states."""

    def __init__(self, action_dim):
        self.action_dim, self.states = action_dim, []

    def run(self, states, training=False, *, epsilon=None, rng=None):
        self.states.append(states.clone())
        return rng.integers(self.action_dim, size=len(states))


def random_actions(action_dim, shape, seed=0):
    return np.random.default_rng(seed).integers(action_dim, size=shape)


def play(env, seed, actions):
    """The states and rows of `actions` [T, N] after a reset, as a list of tuples of tensors."""
    seen = [env.reset(seed)]
    seen += [env.step(row) for row in actions]
    return [(states, *row) for states, row in seen]


def same(run, other):
    return len(run) == len(other) and all(
        torch.equal(a, b)
        for row, other_row in zip(run, other, strict=True)
        for a, b in zip(row, other_row, strict=True)
    )


def until_terminal(env, action=NOOP, limit=400):
    """Step a single game until a life or the game ends; return the number of steps, the states and the row."""
    for number in range(1, limit + 1):
        states, row = env.step(np.array([action]))
        if row.terminals[0]:
            return number, states, row
    raise AssertionError(f"no life was lost in {limit} steps")


def area_average(screen, size=84):
    """`screen` averaged to size x size, each pixel over exactly the area that it covers."""
    for axis, length in enumerate(screen.shape):
        edges = np.arange(size + 1) * length / size
        sums = np.concatenate(
            [np.zeros_like(screen.take([0], axis), dtype=float), screen.cumsum(axis, dtype=float)], axis
        )
        below = np.minimum(edges.astype(int), length - 1)
        part = (edges - below).reshape([-1, 1] if axis == 0 else [1, -1])
        at_edges = sums.take(below, axis) * (1 - part) + sums.take(below + 1, axis) * part
        screen = np.diff(at_edges, axis=axis) * size / length
    return screen


# ---- pixels

GOLDEN_CLOCK = 10
GOLDEN_MEMORY = "95cec3133def9162"
GOLDEN_SCREENS = "8b7ef3951ae00549"
GOLDEN_FRAMES = "d3c53d731bf719b5"


def test_golden_frames_of_a_known_game(starts):
    actions = [(t * t // 3 + t // 7) % 4 for t in range(200)]
    env = AtariEnv("breakout", 1)
    rows = play(env, 0, np.array(actions)[:, None])

    clock = int(starts[0][1][0])
    assert clock == GOLDEN_CLOCK, "the game starts otherwise: a change of seeds or no-ops, not of pixels"
    game, memory, screens = PlainGame("breakout", clock, "getScreenGrayscale"), hashlib.sha256(), hashlib.sha256()
    for action in actions:
        game.step(action)
        memory.update(game.ale.getRAM().tobytes())
        screens.update(game.picture.tobytes())
    assert memory.hexdigest()[:16] == GOLDEN_MEMORY, "the emulator plays otherwise: not a change of preprocessing"
    assert screens.hexdigest()[:16] == GOLDEN_SCREENS, "the emulator draws otherwise: not a change of preprocessing"

    frames = hashlib.sha256(torch.stack([frame for _, frame, *_ in rows]).numpy().tobytes())
    assert frames.hexdigest()[:16] == GOLDEN_FRAMES, "preprocessing changed: if that is meant, put the new hash here"


@pytest.mark.parametrize(
    ("game", "max_frames"), [("breakout", 18_000), ("pong", 400), ("seaquest", 402), ("montezuma_revenge", 403)]
)
def test_a_frame_is_the_area_average_of_the_last_two_gray_screens_at_their_brightest(game, max_frames, starts):
    env = AtariEnv(game, 1, max_frames=max_frames)
    _, row = env.reset(3)
    plain = PlainGame(game, starts[0][1][0], "getScreenGrayscale", max_frames=max_frames)
    rng = np.random.default_rng(0)
    while True:
        np.testing.assert_allclose(row.frames[0], area_average(plain.picture), atol=0.51)
        if plain.over:
            break
        action = rng.integers(4)
        _, row = env.step(np.array([action]))
        plain.step(action)
        assert row.terminals.tolist() == [plain.lost_life]
    assert env.step(np.array([NOOP]))[1].ages.tolist() == [0]
    assert [game.score for game in env.finished_games] == [plain.score]


# ---- stacks and rows


@pytest.mark.parametrize(
    ("game", "games", "steps", "max_frames", "options", "kinds"),
    [
        ("breakout", 3, 500, 640, {}, "lost lives, game overs, frame limits"),
        ("pong", 2, 900, 108_000, {}, "game overs"),
        ("seaquest", 3, 600, 1800, {}, "lost lives, game overs, frame limits, scores above 1"),
        ("montezuma_revenge", 3, 600, 1800, {}, "lost lives, game overs, frame limits"),
        ("ms_pacman", 2, 400, 1200, {}, "lost lives, scores above 1"),  # it has no FIRE to press
        ("breakout", 2, 250, 600, {"stack_size": 2, "frame_skip": 3}, "lost lives, frame limits"),
        ("breakout", 3, 500, 640, {"terminal_on_life_loss": False}, "lost lives, game overs, frame limits"),
        ("pong", 2, 100, 300, {"repeat_action_probability": 0.25, "full_action_space": True}, "frame limits"),
    ],
)
def test_states_and_rows_equal_ales_own_through_lost_lives_and_ends(
    game, games, steps, max_frames, options, kinds, starts
):
    size, life_loss = options.get("stack_size", 4), options.get("terminal_on_life_loss", True)
    env = AtariEnv(game, games, max_frames=max_frames, **options)
    states, row = env.reset(11)
    seeds, clock = starts[0]
    ale = AtariVectorEnv(
        game,
        games,
        stack_num=size,
        frameskip=options.get("frame_skip", 4),
        max_num_frames_per_episode=max_frames,
        reward_clipping=False,
        life_loss_info=life_loss,
        repeat_action_probability=options.get("repeat_action_probability", 0.0),
        full_action_space=options.get("full_action_space", False),
    )
    frames, info = ale.reset(seed=seeds)
    assert np.array_equal(states, frames)
    meanings = env.get_action_meanings()
    fire = meanings.index("FIRE") if "FIRE" in meanings else None
    first_clock, scores, finished = clock.copy(), np.zeros(games), []
    ages, ended, lost_life = np.zeros(games), np.zeros(games, bool), np.zeros(games, bool)
    sticky = "repeat_action_probability" in options
    seen = dict.fromkeys(["lost lives", "game overs", "frame limits", "scores above 1"], 0)

    rng = np.random.default_rng(0)
    for _ in range(steps):
        sent, lives = rng.integers(len(meanings), size=games), info["lives"]
        states, row = env.step(sent)
        expected, rewards, terminated, _, info = ale.step(row.actions.numpy())

        # Where the first FIRE of a game may have been lost to a repeated action, it is pressed once more.
        executed = sent if fire is None else np.where(lost_life | (sticky & (ages == 0)), fire, sent)
        ages = np.where(ended, 0, np.minimum(ages + 1, size - 1))
        assert np.array_equal(states, expected)
        assert np.array_equal(row.frames, expected[:, -1])
        assert np.array_equal(row.rewards, np.clip(rewards, -1, 1))
        assert np.array_equal(row.terminals, terminated)
        assert np.array_equal(row.ages, ages)
        assert np.array_equal(row.actions[~ended], executed[~ended])

        scores = np.where(ended, 0, scores) + rewards
        first_clock[ended] = info["episode_frame_number"][ended]
        game_over = terminated & (info["lives"] == 0)
        limit = info["episode_frame_number"] - first_clock >= max_frames
        ended = game_over | limit
        lost_life = (terminated if life_loss else info["lives"] < lives) & ~ended
        finished += list(scores[ended])
        seen["lost lives"] += lost_life.sum()
        seen["game overs"] += game_over.sum()
        seen["frame limits"] += (limit & ~game_over).sum()
        seen["scores above 1"] += (rewards > 1).sum()

    env.step(np.zeros(games, int))  # a score is told at the latest when the next game starts
    assert [game.score for game in env.finished_games] == finished
    assert not [kind for kind in kinds.split(", ") if not seen[kind]]


def test_reset_gives_a_row_of_first_frames_with_nothing_before_them():
    env = AtariEnv("seaquest", 2)
    for seed in (0, 1):
        states, row = env.reset(seed)
        assert states.shape == (2, 4, 84, 84)
        assert states.dtype == torch.uint8
        assert not states[:, :3].any()
        assert torch.equal(states[:, 3], row.frames)
        assert row.frames.flatten(1).any(1).all()
        assert [field.dtype for field in row] == [torch.uint8, torch.int64, torch.float32, torch.bool, torch.int64]
        assert [tuple(field.shape) for field in row] == [(2, 84, 84), (2,), (2,), (2,), (2,)]
        assert not row.rewards.any()
        assert not row.terminals.any()
        assert not row.ages.any()
        env.step(np.array([1, 2]))


def test_tensors_once_returned_never_change():
    env = AtariEnv("breakout", 2, max_frames=200)
    kept = play(env, 0, random_actions(4, (120, 2)))
    copies = [tuple(tensor.clone() for tensor in row) for row in kept]
    play(env, 1, random_actions(4, (60, 2), seed=1))
    assert same(kept, copies)


# ---- lives, ends and FIRE


def test_a_lost_life_is_terminal_but_the_game_and_its_stack_go_on():
    env = AtariEnv("breakout", 1)
    env.reset(3)
    _, states, row = until_terminal(env)
    assert row.ages.tolist() == [3]
    for _ in range(6):
        earlier = states
        states, row = env.step(np.array([LEFT]))
        assert torch.equal(states[:, :3], earlier[:, 1:])
        assert row.terminals.tolist() == [False]
        assert row.ages.tolist() == [3]
    assert env.finished_games == []


@pytest.mark.parametrize("game", ["bank_heist", "frogger"])
@pytest.mark.parametrize("terminal_on_life_loss", [True, False])
def test_a_lost_life_is_terminal_where_the_last_is_played_with_none_left_too(game, terminal_on_life_loss, starts):
    env = AtariEnv(game, 1, terminal_on_life_loss=terminal_on_life_loss)
    env.reset(1)
    plain, lives = PlainGame(game, starts[0][1][0]), []
    for action in random_actions(env.get_action_dim(), 5000):
        plain.step(action)
        _, row = env.step(np.array([action]))
        assert row.terminals.tolist() == [plain.over or (plain.lost_life and terminal_on_life_loss)]
        if plain.lost_life and not plain.over:
            lives.append(plain.ale.lives())
        if plain.over:
            break
    assert plain.over
    assert lives[-1] == 0
    assert env.step(np.array([NOOP]))[1].ages.tolist() == [0]
    assert len(env.finished_lives) == len(lives) + 1


def test_fire_is_pressed_after_a_reset_and_after_each_lost_life_so_every_ball_is_served():
    env = AtariEnv("breakout", 1)
    env.reset(3)
    for life in range(5):  # without FIRE the ball would not move and no life would ever be lost
        _, _, row = until_terminal(env, RIGHT, limit=60)
        assert row.actions.tolist() == [RIGHT]
        if life < 4:
            assert env.step(np.array([RIGHT]))[1].actions.tolist() == [FIRE]
            assert env.step(np.array([RIGHT]))[1].actions.tolist() == [RIGHT]
    _, row = env.step(np.array([RIGHT]))
    assert row.ages.tolist() == [0]
    until_terminal(env, RIGHT, limit=60)  # the next game's first ball was served too


def test_the_row_after_game_over_ignores_its_action_and_starts_a_new_game():
    env, answers = AtariEnv("breakout", 1), []
    for ignored in (NOOP, LEFT):
        env.reset(3)
        env.finished_games.clear()
        for _ in range(5):
            _, _, row = until_terminal(env)
        assert row.ages.tolist() == [3]
        states, row = env.step(np.array([ignored]))
        assert row.ages.tolist() == [0]
        assert row.terminals.tolist() == [False]
        assert row.rewards.tolist() == [0]
        assert not states[:, :3].any()
        assert len(env.finished_games) == 1
        answers.append(torch.stack([states, *(env.step(np.array([NOOP]))[0] for _ in range(30))]))
    assert torch.equal(*answers)


def test_a_game_cut_at_the_frame_limit_is_not_terminal_and_keeps_its_last_frame():
    actions = random_actions(4, (20, 1))
    cut, whole = (play(AtariEnv("pong", 1, max_frames=limit), 5, actions) for limit in (60, 18_000))
    assert same(cut[:15], whole[:15])
    states, _, _, rewards, terminals, ages = cut[15]  # after 60 frames
    assert torch.equal(states[:, :3], whole[15][0][:, :3])
    assert states[:, 3].any()
    assert ages.tolist() == [3]
    assert not terminals.any()
    states, frames, _, rewards, terminals, ages = cut[16]
    assert not states[:, :3].any()
    assert torch.equal(states[:, 3], frames)
    assert not rewards.any()
    assert not terminals.any()
    assert [ages.tolist() for *_, ages in cut[16:]] == [[0], [1], [2], [3], [3]]


def test_a_life_lost_at_the_very_frame_limit_ends_the_game():
    env = AtariEnv("breakout", 1)
    env.reset(3)
    steps, _, _ = until_terminal(env)
    cut = AtariEnv("breakout", 1, max_frames=4 * steps)
    cut.reset(3)
    cut_steps, _, row = until_terminal(cut)
    assert cut_steps == steps
    assert row.ages.tolist() == [3]
    states, row = cut.step(np.array([NOOP]))
    assert row.ages.tolist() == [0]
    assert not states[:, :3].any()
    assert [game.score for game in cut.finished_games] == [0.0]
    assert cut.step(np.array([RIGHT]))[1].actions.tolist() == [RIGHT]


def test_finished_games_are_raw_and_the_callers_to_clear():
    env = AtariEnv("pong", 2, max_frames=800)
    env.reset(0)
    for _ in range(2):
        for _ in range(201):
            env.step(np.array([NOOP, NOOP]))
        assert len(env.finished_games) == 2
        assert max(game.score for game in env.finished_games) < -1  # each lost point is -1: the sum is not clipped
        env.finished_games.clear()


# ---- the same run again


def test_the_same_seed_gives_the_same_run_in_a_fresh_and_in_a_used_env():
    actions = random_actions(4, (220, 2))
    env = AtariEnv("breakout", 2)
    run = play(env, 7, actions)
    assert any((ages == 0).any() for *_, ages in run[1:])  # through the no-ops of later games too
    assert same(run, play(env, 7, actions))
    assert same(run, play(AtariEnv("breakout", 2), 7, actions))


def test_another_seed_gives_another_run_and_the_games_of_one_env_differ():
    env = AtariEnv("breakout", 6)
    first_frames = [env.reset(seed)[1].frames for seed in (7, 8)]
    assert not torch.equal(*first_frames)
    assert len({frame.numpy().tobytes() for frames in first_frames for frame in frames}) >= 6


def test_the_number_of_threads_changes_nothing():
    actions = random_actions(18, (80, 3))
    run = play(AtariEnv("seaquest", 3, num_threads=1), 2, actions)
    for threads in (0, 2, 5):
        assert same(run, play(AtariEnv("seaquest", 3, num_threads=threads), 2, actions))


def test_send_and_recv_are_the_halves_of_step():
    actions = random_actions(4, (40, 2))
    env = AtariEnv("breakout", 2)
    run = play(env, 4, actions)
    halves = [env.reset(4)]
    for action in actions:
        env.send(action)
        halves.append(env.recv())
    assert same(run, [(states, *row) for states, row in halves])


def test_a_reset_forgets_the_step_in_flight():
    actions = random_actions(4, (30, 2))
    env = AtariEnv("breakout", 2)
    run = play(env, 9, actions)
    env.send(actions[0])
    assert same(run, play(env, 9, actions))


def test_evaluating_changes_nothing_in_training():
    env = AtariEnv("breakout", 2)

    def train(evaluate):
        agent, seen = Agent(4, eps_decay=200, seed=1), []
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        states, _ = env.reset(5)
        env.finished_games.clear()
        for number in range(200):
            actions = agent.run(states, training=True)
            env.send(actions)
            if evaluate and number in (20, 60):  # even with a step in flight
                env.evaluate(agent, 1, 0.05, seed=number, max_frames=80, record=number == 20)
            states, row = env.recv()
            seen.append((states, *row, torch.from_numpy(actions)))
            if evaluate and number == 90:
                env.evaluate(agent, 2, 0.5, seed=number, max_frames=80)
        return seen, agent.epsilon, env.finished_games.copy(), torch.rand(1), np.random.rand()  # noqa: NPY002

    run, *rest = train(evaluate=True)
    expected_run, *expected_rest = train(evaluate=False)
    assert same(run, expected_run)
    assert rest == expected_rest
    assert rest[1], "no game ended: the test is too short to see a score lost"


# ---- illegal actions

ILLEGAL = {
    "negative": [-1, 0],
    "one too high": [0, 4],
    "far too high": [2**40, 0],
    "too few": [0],
    "too many": [0, 0, 0],
    "none": [],
    "a table": [[0, 0]],
    "a single number": 0,
    "a fraction": [0.5, 0],
    "not a number": [float("nan"), 0],
    "infinite": [0, float("inf")],
    "words": ["left", "right"],
}


@pytest.fixture(scope="module")
def two_games():
    env = AtariEnv("breakout", 2)
    return env, play(env, 0, np.full((4, 2), RIGHT))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ILLEGAL)
def test_illegal_actions_are_refused_before_they_reach_the_emulators(name, two_games):
    env, run = two_games
    env.reset(0)
    with pytest.raises(ValueError, match=r"."):
        env.send(np.array(ILLEGAL[name]))  # never `step`: were it accepted, its `recv` would wait for ever
    assert same([(states, *row) for states, row in (env.step(np.array([RIGHT, RIGHT])) for _ in range(4))], run[1:])


def test_the_refusal_of_an_action_names_it_and_what_is_legal(two_games):
    env, _ = two_games
    env.reset(0)
    with pytest.raises(ValueError, match=r"3.*17"):
        env.send(np.array([0, 17]))
    with pytest.raises(ValueError, match="2"):
        env.send(np.array([0]))


# ---- evaluation


@pytest.mark.parametrize(
    ("game", "episodes", "max_frames", "frame_skip"),
    [("breakout", 3, 18_000, 4), ("seaquest", 3, 18_000, 4), ("pong", 1, 18_000, 6), ("freeway", 2, 1200, 4)],
)
def test_evaluation_gives_the_raw_scores_of_whole_games(game, episodes, max_frames, frame_skip, starts):
    action_dim = {"breakout": 4, "seaquest": 18, "pong": 6, "freeway": 3}[game]
    agent = ScriptedAgent(random_actions(action_dim, 4501, seed=3))
    env = AtariEnv(game, 1, frame_skip=frame_skip)
    scores = env.evaluate(agent, episodes, 0.05, seed=1, max_frames=max_frames)

    assert scores.shape == (episodes,)
    assert scores.dtype == np.float64
    for score, clock in zip(scores, starts[-1][1], strict=True):
        plain = PlainGame(game, clock, frame_skip=frame_skip, max_frames=max_frames)
        for action in agent.actions:
            plain.step(action)
            if plain.over:
                break
        assert plain.over
        assert score == plain.score
    assert game == "freeway" or any(abs(score) > 1 for score in scores)


def test_games_of_training_last_half_an_hour_and_those_of_evaluations_five_minutes_at_most(monkeypatch):
    limits, make = [], AtariVectorEnv.__init__

    def watched(self, *args, **kwargs):
        limits.append((kwargs["max_num_frames_per_episode"], kwargs["frameskip"]))
        make(self, *args, **kwargs)

    monkeypatch.setattr(AtariVectorEnv, "__init__", watched)
    AtariEnv("breakout", 1, frame_skip=60).evaluate(RandomAgent(4), 1, 0.05, seed=1)
    assert limits == [(30 * 60 * 60, 60), (5 * 60 * 60, 60)]


def test_a_game_that_is_over_first_counts_only_once(starts):
    actions = random_actions(4, (1000, 2), seed=3)
    actions[:, 0] = np.where(np.arange(1000) < 155, LEFT, NOOP)  # scores in a short game, then plays on for nothing
    agent = ScriptedAgent(actions)
    scores = AtariEnv("breakout", 1).evaluate(agent, 2, 0.05, seed=1)
    lengths = []
    for score, clock, script in zip(scores, starts[-1][1], actions.T, strict=True):
        plain, played = PlainGame("breakout", clock), 0
        while not plain.over:
            plain.step(script[played])
            played += 1
        assert score == plain.score
        assert score > 0
        lengths.append(played)
    assert lengths[1] > lengths[0] + 140, "the second game must outlast two of the first, or this shows nothing"


def test_evaluation_ends_each_game_at_the_frame_limit(starts):
    agent = ScriptedAgent([NOOP] * 2000)
    scores = AtariEnv("pong", 1).evaluate(agent, 2, 0.05, seed=0, max_frames=1000)
    assert len(agent.calls) in (250, 251)  # one more where a game's end is seen by the start of the next
    for score, clock in zip(scores, starts[-1][1], strict=True):
        plain = PlainGame("pong", clock, max_frames=1000)
        while not plain.over:
            plain.step(NOOP)
        assert score == plain.score
        assert score < 0


def test_an_agent_that_never_presses_a_button_still_finishes_its_evaluation():
    agent = ScriptedAgent([NOOP] * 1000)  # would wait for the second ball until the frame limit
    assert AtariEnv("breakout", 1).evaluate(agent, 1, 0.0, seed=0).shape == (1,)


def test_evaluation_shows_the_agent_stacks_of_every_game_and_its_own_epsilon_and_stream():
    agent = ScriptedAgent([FIRE, RIGHT, NOOP] * 100)
    AtariEnv("breakout", 2, stack_size=3).evaluate(agent, 4, 0.25, seed=0, max_frames=120)
    assert all(states.shape == (4, 3, 84, 84) and states.dtype == torch.uint8 for states in agent.states)
    assert not agent.states[0][:, :2].any()
    for earlier, later in itertools.pairwise(agent.states[:30]):
        assert torch.equal(later[:, :2], earlier[:, 1:])
    for training, epsilon, rng in agent.calls:
        assert not training
        assert epsilon == 0.25
        assert isinstance(rng, np.random.Generator)


def test_evaluation_starts_its_games_after_different_numbers_of_no_ops(starts):
    AtariEnv("breakout", 1).evaluate(ScriptedAgent([NOOP] * 100), 12, 0.05, seed=0, max_frames=40)
    clocks = starts[-1][1]
    assert len(set(clocks.tolist())) >= 6
    assert clocks.min() >= 1
    assert clocks.max() < 30


def test_the_same_seed_gives_the_same_evaluation_and_another_seed_another():
    def evaluate(env, seed):
        agent = RandomAgent(18)
        return env.evaluate(agent, 2, 0.05, seed=seed, max_frames=400), torch.stack(agent.states)

    env = AtariEnv("seaquest", 1)
    scores, states = evaluate(env, 4)
    _, other_states = evaluate(env, 5)
    again, same_states = evaluate(AtariEnv("seaquest", 3, num_threads=1), 4)
    assert np.array_equal(scores, again)
    assert torch.equal(states, same_states)
    assert not torch.equal(states[:100], other_states[:100])
    assert not torch.equal(states[:100, 0], states[:100, 1])  # the games of one evaluation differ


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_evaluation_that_is_interrupted_leaves_the_next_one_as_it_was(monkeypatch, when):
    env, agent, most = AtariEnv("breakout", 1), RandomAgent(4), 40
    expected = env.evaluate(agent, 2, 0.05, seed=7, max_frames=most)
    receive, steps = AtariEnv.recv, len(agent.states)
    assert steps in (10, 11)
    for last in (1, 2, 5, steps - 1, steps):
        left = itertools.count(1 - last)

        def recv(games, left=left):
            rest = next(left)
            if when == "before" and not rest:
                raise KeyboardInterrupt
            received = receive(games)
            if not rest:
                raise KeyboardInterrupt
            return received

        with monkeypatch.context() as patch:
            patch.setattr(AtariEnv, "recv", recv)
            with pytest.raises(KeyboardInterrupt):
                env.evaluate(agent, 2, 0.05, seed=7, max_frames=most)
        assert np.array_equal(env.evaluate(agent, 2, 0.05, seed=7, max_frames=most), expected)


# ---- pictures


def recorded(env):
    frames = []
    while (frame := env.get_frame()) is not None:
        frames.append(frame)
    return frames


@pytest.mark.parametrize(
    ("game", "action_dim", "frame_skip"), [("breakout", 4, 4), ("seaquest", 18, 3), ("ms_pacman", 9, 4)]
)
def test_recorded_frames_are_the_true_colours_of_the_first_game_from_start_to_end(game, action_dim, frame_skip, starts):
    env = AtariEnv(game, 1, frame_skip=frame_skip)
    agent = ScriptedAgent(random_actions(action_dim, 4501, seed=3))
    env.evaluate(agent, 2, 0.05, seed=1, record=True)
    frames = recorded(env)
    plain = PlainGame(game, starts[0][1][0], "getScreenRGB", frame_skip)
    expected = [plain.picture]
    for action in agent.actions:
        plain.step(action)
        first, second = plain.drawn
        brighter = (first @ [0.299, 0.587, 0.114] > second @ [0.299, 0.587, 0.114])[:, :, None]
        expected.append(second if plain.over else np.where(brighter, first, second))
        if plain.over:
            break

    assert len(frames) == len(expected)
    for frame, other in zip(frames, expected, strict=True):
        assert frame.shape == (210, 160, 3)
        assert frame.dtype == np.uint8
        assert np.array_equal(frame, other)


@pytest.mark.parametrize(
    ("game", "rows", "options"),
    [
        ("breakout", 210, {}),
        ("breakout", 210, {"repeat_action_probability": 0.5, "full_action_space": True}),
        ("klax", 250, {}),
        ("ms_pacman", 210, {}),  # whose sprites flicker
    ],
)
def test_a_recorded_game_shows_what_the_agent_saw(game, rows, options):
    env = AtariEnv(game, 1, **options)
    agent = ScriptedAgent([RIGHT, LEFT, LEFT, NOOP, RIGHT] * 100)
    env.evaluate(agent, 2, 0.05, seed=6, max_frames=320, record=True)
    frames = recorded(env)
    assert len(frames) == 81
    assert frames[0].shape == (rows, 160, 3)
    assert len(np.unique(np.concatenate(frames).reshape(-1, 3), axis=0)) < 20  # none between those of the console
    for frame, states in zip(frames[:80], agent.states[:80], strict=True):
        gray = frame @ np.array([0.299, 0.587, 0.114])
        assert abs(area_average(gray) - states[0, -1].numpy()).max() < 2


def test_a_saved_recording_holds_every_frame_and_an_animation(tmp_path):
    env = AtariEnv("breakout", 1)
    script = [RIGHT, LEFT, LEFT, NOOP] * 100
    env.evaluate(ScriptedAgent(script), 1, 0.05, seed=6, max_frames=120, record=True)
    frames = recorded(env)
    env.evaluate(ScriptedAgent(script), 1, 0.05, seed=6, max_frames=120, record=True)
    env.save_recording(tmp_path / "eval_003")
    pictures = sorted((tmp_path / "eval_003").iterdir())
    assert [picture.name for picture in pictures] == [f"{number:06d}.png" for number in range(31)]
    for frame, picture in zip(frames, pictures, strict=True):
        with Image.open(picture) as image:
            assert np.array_equal(np.asarray(image), frame)
    with Image.open(tmp_path / "eval_003.gif") as animation:
        assert animation.is_animated


# ---- games and their actions


def test_every_name_of_a_game_in_gymnasium_means_its_rom():
    gymnasium.register_envs(ale_py)
    names = {
        name: spec.kwargs["game"] for name, spec in gymnasium.registry.items() if "ale_py" in str(spec.entry_point)
    }
    assert len(names) > 300
    assert {name: normalize_game(name) for name in names} == names


@pytest.mark.parametrize("name", ["breakout", "Breakout", "ALE/Breakout-v5", "BreakoutNoFrameskip-v4", "BREAKOUT"])
def test_usual_spellings_mean_the_same_game(name):
    assert normalize_game(name) == "breakout"


@pytest.mark.parametrize("rom", ["ms_pacman", "montezuma_revenge", "tic_tac_toe_3d", "up_n_down", "pong"])
def test_the_name_of_a_rom_stays(rom):
    assert normalize_game(rom) == rom


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("brekout", "there is no game 'brekout'; is it 'breakout'"),
        ("ALE/Seaqest-v5", "'seaquest'"),
        ("MsPackmanNoFrameskip-v4", "'ms_pacman'"),
        ("", "empty"),
        ("???", "empty"),
        ("nonsense", "^there is no game 'nonsense'$"),
    ],
)
def test_an_unknown_game_is_refused_with_the_nearest_name(name, nearest):
    for refuse in (normalize_game, lambda game: AtariEnv(game, 1)):
        with pytest.raises(ValueError, match=nearest):
            refuse(name)


@pytest.mark.parametrize("name", ["combat", "joust", "ALE/MazeCraze-v5", "warlords"])
def test_a_game_for_two_is_refused_by_name_because_the_emulator_would_end_the_process(name):
    with pytest.raises(ValueError, match="two players"):
        normalize_game(name)


@pytest.mark.parametrize(
    ("game", "lives", "meanings"),
    [
        ("breakout", 5, "NOOP FIRE RIGHT LEFT"),
        ("pong", 0, "NOOP FIRE RIGHT LEFT RIGHTFIRE LEFTFIRE"),
        ("freeway", 0, "NOOP UP DOWN"),
        ("ALE/MsPacman-v5", 3, "NOOP UP RIGHT LEFT DOWN UPRIGHT UPLEFT DOWNRIGHT DOWNLEFT"),
    ],
)
def test_actions_and_lives_are_the_games_own(game, lives, meanings):
    env = AtariEnv(game, 1)
    env.reset(0)
    assert env.get_action_meanings() == meanings.split()
    assert env.get_action_dim() == len(meanings.split())
    assert env.get_eval_lives() == lives


# ---- misuse ----


@pytest.mark.parametrize("wrong", [{"num_envs": 0}, {"num_envs": -1}, {"num_envs": 2, "max_frames": 4}])
def test_sizes_that_the_emulators_would_choke_on_are_refused(wrong):
    with pytest.raises(ValueError, match="must be at least"):
        AtariEnv("breakout", **wrong)


def test_receiving_without_sending_is_refused():
    env = AtariEnv("breakout", 1)
    env.reset(0)
    with pytest.raises(RuntimeError, match="send first"):
        env.recv()


def test_without_a_recording_there_is_no_frame_and_nothing_to_save(tmp_path):
    env = AtariEnv("breakout", 1)
    assert env.get_frame() is None
    with pytest.raises(ValueError, match="no evaluation was recorded"):
        env.save_recording(tmp_path / "eval")
    assert list(tmp_path.iterdir()) == []


def test_one_frame_a_stack_still_tells_a_games_first_frame_from_the_others():
    env = AtariEnv("breakout", 1, stack_size=1)
    states, row = env.reset(0)
    assert (states.shape, row.ages.item()) == ((1, 1, 84, 84), 0)
    assert env.step(np.array([0]))[1].ages.item() == 1
