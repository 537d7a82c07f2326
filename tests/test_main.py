"""Whole runs in process with tiny constants, overrides from the command line, and every kind of bad input."""

import functools
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_learning import CORRIDOR, TableEnv

import main
import utils_config
import utils_drl
import utils_log
import utils_machine
import utils_memory
from utils_env import AtariEnv

TINY = {
    "MAX_STEPS": 400,
    "NUM_ENVS": 4,
    "WARM_STEPS": 100,
    "MEM_SIZE": 300,
    "TARGET_UPDATE": 100,
    "POLICY_UPDATE": 20,
    "BATCH_SIZE": 4,
    "EVALUATE_FREQ": 200,
    "EVAL_EPISODES": 1,
    "EVAL_EPS": 1.0,  # random play ends games soon
    "PRECISION": "float32",
    "DEVICE": "cpu",
    "PRIORITIZED": False,
    "DOUBLE_DQN": False,
    "LAYER_NORM": False,
    "N_STEP": 1,
    "THREADS": 1,  # small work gains nothing from a second one, and on a busy machine they wait for each other
}


class Corridor(TableEnv):
    """The corridor made as AtariEnv is made."""

    def __init__(self, game, num_envs, device, **options):
        super().__init__(CORRIDOR, num_envs)


TABLE = {"AtariEnv": Corridor, "STACK_SIZE": 1}  # games that start at once, for runs where others show no more


def run_in(directory: Path, **constants) -> int:
    """Run main.py in a directory as from the shell, with tiny constants but for these; its status."""
    directory.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(sys, "argv", ["main.py"])
        for name, value in {**TINY, **constants}.items():
            patch.setattr(main, name, value)
        return utils_config.run(main.main, vars(main))


@pytest.fixture
def tiny_run(monkeypatch, tmp_path):
    """A function that runs main.main() in an empty directory with tiny constants and returns what it wrote."""
    number = iter(range(100))

    def start(**constants) -> "Run":
        directory = tmp_path / f"run{next(number)}"
        directory.mkdir()
        monkeypatch.chdir(directory)
        for name, value in {**TINY, **constants}.items():
            monkeypatch.setattr(main, name, value)
        main.main()
        return Run(directory)

    return start


class Run:
    """The results of one run."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.lines = (directory / "rewards.txt").read_text().splitlines()
        self.models = sorted(path.name for path in (directory / "models").glob("model_*"))

    def weights(self, number: int) -> dict[str, torch.Tensor]:
        """The weights of model `number`."""
        return torch.load(self.directory / "models" / f"model_{number:03d}", weights_only=True)["weights"]

    def same_as(self, other: "Run") -> bool:
        """Whether both runs wrote the same rows and the same last model, bit for bit."""
        last = len(self.models) - 1
        mine, its = self.weights(last), other.weights(last)
        return self.lines == other.lines and all(torch.equal(mine[name], its[name]) for name in mine)


@pytest.mark.filterwarnings("error")
def test_a_run_writes_a_row_and_a_model_for_step_0_and_every_evaluation(tiny_run):
    run = tiny_run()
    assert [line[:12] for line in run.lines] == ["  0        0", "  1      200", "  2      400"]
    assert all(re.fullmatch(r" {2}\d {1}[ \d]{8} \d+\.\d", line) for line in run.lines)
    assert run.models == ["model_000", "model_001", "model_002"]


def test_learning_starts_after_the_warm_steps(tiny_run):
    idle = tiny_run(WARM_STEPS=299, **TABLE)
    unchanged, first = idle.weights(1), idle.weights(0)
    assert all(torch.equal(unchanged[name], first[name]) for name in first)
    assert any(not torch.equal(idle.weights(2)[name], first[name]) for name in first)


def noted(monkeypatch, owner: type, name: str, note) -> None:
    """Let each call of the method first be told to `note`, with its owner's name and its own, and its arguments."""
    original = getattr(owner, name)

    def method(self, *args, **kwargs):
        note(f"{owner.__name__}.{name}", self, args, kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, method)


def test_epsilon_falls_from_the_first_update_on(monkeypatch, tiny_run):
    seen = []
    noted(monkeypatch, main.Agent, "run", lambda _, agent, __, options: options or seen.append(agent.epsilon))
    tiny_run(**TABLE, MAX_STEPS=200, EPS_END=0.0, EPS_DECAY=40)
    first = TINY["WARM_STEPS"] + 2 * 4  # the step whose iteration finds so many transitions in memory
    assert seen == pytest.approx([1 - min(max(step - first, 0) / 40, 1) for step in range(4, 204, 4)])


def test_as_many_updates_and_syncs_are_made_as_the_constants_say(monkeypatch, tiny_run):
    updates, syncs = [], []
    noted(monkeypatch, main.Agent, "learn", lambda _, __, args, ___: updates.append((*args[2:], 1)[0]))
    noted(monkeypatch, main.Agent, "sync", lambda *_: syncs.append(1))
    tiny_run(**TABLE, MAX_STEPS=200, POLICY_UPDATE=2, TARGET_UPDATE=60)
    assert updates == [2] * ((200 - 104) // 4)  # from step 108 on
    assert len(syncs) == 1 + 3  # the first when the agent is made


@pytest.mark.parametrize("seed", [0, 7])
def test_every_random_number_comes_from_the_seed_and_the_step_by_a_stream_of_its_own(monkeypatch, tiny_run, seed):
    seeds = []

    def note(name, _, args, kwargs) -> None:
        seeds.append((name, kwargs["seed"] if "seed" in kwargs else args[-1]))

    for owner in (main.Agent, main.ReplayMemory):
        noted(monkeypatch, owner, "__init__", note)
        noted(monkeypatch, owner, "reseed", note)
    for name in ("reset", "evaluate"):
        noted(monkeypatch, Corridor, name, note)
    tiny_run(**TABLE, MAX_STEPS=200, CHECKPOINT_FREQ=100, SEED=seed)

    def start(step: int) -> list[tuple[str, list[int]]]:
        names = ("Agent.reseed", "ReplayMemory.reseed", "Corridor.reset")
        return [(name, [seed, step, number]) for name, number in zip(names, (2, 3, 0), strict=True)]

    made = [("Agent.__init__", seed), ("ReplayMemory.__init__", seed)]
    first, last = (("Corridor.evaluate", [seed, step, 1]) for step in (0, 200))
    assert seeds == [*made, first, *start(0), *start(100), last]


def test_evaluating_twice_as_often_leaves_training_bit_identical(tiny_run):
    seldom, often = tiny_run(), tiny_run(EVALUATE_FREQ=100)
    assert len(often.lines) == 5
    for number in range(3):
        mine, its = seldom.weights(number), often.weights(2 * number)
        assert all(torch.equal(mine[name], its[name]) for name in mine)
        assert seldom.lines[number].split()[1:] == often.lines[2 * number].split()[1:]


def test_one_game_alone_trains(tiny_run):
    assert len(tiny_run(NUM_ENVS=1, WARM_STEPS=50).lines) == 3


def test_rendering_writes_true_colour_frames_and_an_animation_of_the_same_length(tiny_run):
    run = tiny_run(MAX_STEPS=200, RENDER=True)
    frames = sorted((run.directory / "eval_001").glob("*.png"))
    assert [frame.name for frame in frames] == [f"{number:06d}.png" for number in range(len(frames))]
    picture = np.asarray(Image.open(frames[0]))
    assert picture.shape == (210, 160, 3)
    assert (picture.min(2) != picture.max(2)).any(), "only grays"
    animation = Image.open(run.directory / "eval_001.gif")
    assert animation.is_animated
    assert animation.n_frames <= len(frames)  # equal neighbours are shown as one, longer
    shown = 0
    for number in range(animation.n_frames):
        animation.seek(number)
        shown += animation.info["duration"]
    assert shown == 70 * len(frames)


def test_updates_syncs_and_evaluations_come_at_their_own_rates_whatever_the_number_of_games(monkeypatch):
    for games in (1, 3, 4, 32, 100):
        monkeypatch.setattr(main, "NUM_ENVS", games)
        for every in (1, 4, 7, 250):
            steps = range(games, 2000 + games, games)
            assert sum(main.due(step, every) for step in steps) == steps[-1] // every


class Recorder:
    """Stands in for a class and keeps what it was made and called with."""

    def __init__(self, original):
        self.original, self.made = original, []

    def __call__(self, *args, **kwargs):
        """Make the real object and note its arguments."""
        self.made.append((args, kwargs))
        return self.original(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.original, name)


# Constants that must arrive in arguments of Agent, a memory or AtariEnv, which are called like them but for one.
ARRIVING = {
    "STACK_SIZE": 3,
    "FRAME_SKIP": 5,
    "REPEAT_ACTION_PROBABILITY": 0.15,
    "FULL_ACTION_SPACE": False,
    "TERMINAL_ON_LIFE_LOSS": False,
    "LEARNING_RATE": 0.45,
    "LEARNING_RATE_END_FACTOR": 0.35,
    "LEARNING_RATE_DECAY": 79,
    "ADAM_EPS": 0.55,
    "EPS_START": 0.9,
    "EPS_END": 0.3,
    "EPS_DECAY": 77,
    "DOUBLE_DQN": False,
    "DUELING": False,
    "LAYER_NORM": False,
    "QUANTILES": 1,
    "ATOMS": 1,
    "V_MAX": 3.5,
    "N_STEP": 2,
    "GAMMA": 0.65,
    "ALPHA": 0.75,
    "BETA_START": 0.85,
    "BETA_STEPS": 78,
    "CUDA_GRAPHS": False,
}
# No two constants have the same values in all of these runs, so none can have arrived in place of another.
ARRIVALS = [
    {"QUANTILES": 4, "DOUBLE_DQN": True, "CUDA_GRAPHS": True, "FULL_ACTION_SPACE": True},
    {"ATOMS": 7, "DUELING": True, "CUDA_GRAPHS": True, "TERMINAL_ON_LIFE_LOSS": True},
    {"LAYER_NORM": True},
]
# Constant, another value: rows or weights must differ from those of a plain prioritized run of Atari games ...
EFFECTS_ON_GAMES = [
    ("GAME", "pong"),
    ("SEED", 3),
    ("NUM_ENVS", 5),
    ("STACK_SIZE", 2),
    ("FRAME_SKIP", 3),
    ("REPEAT_ACTION_PROBABILITY", 0.25),
    ("FULL_ACTION_SPACE", True),
    ("TERMINAL_ON_LIFE_LOSS", False),
    ("EVAL_FRAMES", 200),
    ("EVAL_EPISODES", 3),
    ("EVAL_EPS", 0.5),
    ("PRECISION", "bfloat16"),
]
# ... or of a small table, which is enough for what happens behind the games.
EFFECTS_ON_LEARNING = [
    ("MAX_STEPS", 300),
    ("BATCH_SIZE", 5),
    ("POLICY_UPDATE", 10),
    ("TARGET_UPDATE", 50),
    ("WARM_STEPS", 150),
    ("MEM_SIZE", 160),
    ("EVALUATE_FREQ", 100),
    ("CHECKPOINT_FREQ", 120),
    ("LEARNING_RATE", 1e-2),
    ("LEARNING_RATE_END_FACTOR", 1.0),
    ("LEARNING_RATE_DECAY", 10),
    ("ADAM_EPS", 1e-2),
    ("EPS_START", 0.5),
    ("EPS_END", 0.0),
    ("EPS_DECAY", 10),
    ("DOUBLE_DQN", True),
    ("DUELING", True),
    ("LAYER_NORM", True),
    ("QUANTILES", 3),
    ("ATOMS", 3),
    ("N_STEP", 3),
    ("GAMMA", 0.5),
    ("PRIORITIZED", False),
    ("ALPHA", 0.9),
    ("BETA_START", 1.0),
    ("BETA_STEPS", 100),
    ("AVERAGE_STEPS", 1),
]
EFFECTS = [(AtariEnv, *effect) for effect in EFFECTS_ON_GAMES] + [(Corridor, *effect) for effect in EFFECTS_ON_LEARNING]


def same_shapes(one: dict, other: dict) -> bool:
    """Whether two models have the same parameters in the same shapes."""
    return one.keys() == other.keys() and all(one[name].shape == other[name].shape for name in one)


# Enough updates, and few enough random actions, for any constant to leave a trace, in a run that is soon over.
BUSY = {"PRIORITIZED": True, "POLICY_UPDATE": 4, "LEARNING_RATE": 1e-3, "LEARNING_RATE_END_FACTOR": 0.1}
BUSY |= {"EPS_DECAY": 300, "EPS_END": 0.5}
SHORT = {"MAX_STEPS": 200}
PLAIN = {AtariEnv: BUSY | SHORT | {"AtariEnv": AtariEnv}, Corridor: BUSY | SHORT | TABLE}


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """A function that returns the run of these games that every changed constant is compared with."""

    @functools.cache
    def run(games: type) -> Run:
        directory = tmp_path_factory.mktemp("plain")
        assert run_in(directory, **PLAIN[games]) == 0
        return Run(directory)

    return run


@pytest.mark.parametrize(("games", "prioritized"), [(AtariEnv, True), (Corridor, True), (Corridor, False)])
def test_the_same_seed_repeats_a_run_bit_for_bit(tiny_run, plain_run, games, prioritized):
    plain, constants = plain_run(games), PLAIN[games] | {"PRIORITIZED": prioritized}
    assert tiny_run(**constants).same_as(plain if prioritized else tiny_run(**constants))


@pytest.mark.parametrize(("games", "name", "value"), EFFECTS)
def test_every_constant_changes_what_a_run_does(tiny_run, plain_run, games, name, value):
    plain = plain_run(games)  # first, while the constants are still its own
    run = tiny_run(**{**PLAIN[games], name: value})
    mine, its = run.weights(len(run.models) - 1), plain.weights(len(plain.models) - 1)
    if run.lines == plain.lines and same_shapes(mine, its):
        assert any(not torch.equal(mine[key], its[key]) for key in mine)


def test_v_max_changes_what_a_run_with_atoms_does(tiny_run):
    constants = PLAIN[Corridor] | {"ATOMS": 5}
    narrow, wide = (tiny_run(**constants, V_MAX=v_max).weights(1) for v_max in (3.0, 10.0))
    assert any(not torch.equal(narrow[key], wide[key]) for key in narrow)


@pytest.mark.parametrize("changes", ARRIVALS, ids=["quantiles", "atoms", "norm"])
def test_every_constant_arrives_where_it_belongs(monkeypatch, tiny_run, changes):
    recorders = {cls: Recorder(getattr(main, cls)) for cls in ("Agent", "AtariEnv", "PrioritizedReplayMemory")}
    for cls, recorder in recorders.items():
        monkeypatch.setattr(main, cls, recorder)
    constants = {**ARRIVING, **changes}
    tiny_run(PRIORITIZED=True, MAX_STEPS=8, **constants)
    made = [kwargs for recorder in recorders.values() for _, kwargs in recorder.made]
    for name, value in constants.items():
        argument = "graphs" if name == "CUDA_GRAPHS" else name.lower()
        assert {kwargs[argument] for kwargs in made if argument in kwargs} == {value}, name


def test_average_steps_are_counted_in_updates_by_the_agent(monkeypatch, tiny_run):
    monkeypatch.setattr(main, "Agent", recorder := Recorder(main.Agent))
    tiny_run(**TABLE, MAX_STEPS=8, AVERAGE_STEPS=300, POLICY_UPDATE=20)
    assert [kwargs["average_updates"] for _, kwargs in recorder.made] == [15]


def test_the_policy_is_the_same_whatever_is_averaged(tiny_run):
    runs = [tiny_run(**BUSY, **TABLE, AVERAGE_STEPS=steps, CHECKPOINT_FREQ=400) for steps in (1, 200)]
    saved = [torch.load(run.directory / "models" / "checkpoint_0000000400", weights_only=True) for run in runs]
    mine, its = (checkpoint["agent"]["policy"] for checkpoint in saved)
    assert all(torch.equal(mine[name], its[name]) for name in mine)
    mine, its = (run.weights(2) for run in runs)
    assert any(not torch.equal(mine[name], its[name]) for name in mine)


def test_every_constant_is_covered_by_these_tests():
    tested = {name for _, name, _ in EFFECTS} | {"V_MAX"}
    tested |= {"RENDER", "PLAY", "SAVE_PREFIX", "DEVICE", "THREADS", "CUDA_GRAPHS"}
    assert tested == set(utils_config.types(vars(main)))


def test_the_readme_names_every_constant_with_its_default():
    readme = Path(main.__file__).with_name("README.md").read_text()
    rows = readme.partition("| constant | default | what it is |")[2].partition("\n\n")[0]
    table = re.findall(r"^\| (`[A-Z_`, ]+`) \| (.*?) \|", rows, re.M)
    told = {}
    for names, defaults in table:
        told.update(zip(re.findall(r"`(\w+)`", names), re.findall(r"`(.*?)`", defaults), strict=True))
    assert {name: eval(text) for name, text in told.items()} == {
        name: getattr(main, name) for name in utils_config.types(vars(main))
    }


def test_the_learner_has_as_many_threads_as_it_is_given(monkeypatch, tiny_run):
    monkeypatch.setattr(utils_machine, "count_cores", lambda: 4)  # whatever this machine has
    try:
        tiny_run(**TABLE, MAX_STEPS=8, THREADS=3)
        assert torch.get_num_threads() == 3
        tiny_run(**TABLE, MAX_STEPS=8, THREADS=0)
        assert torch.get_num_threads() == 3, "0 leaves the choice to torch, where there are as many cores"
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("avx512", "library", "device", "chosen"),
    [
        (True, True, "cpu", "bfloat16"),
        (True, False, "cpu", "float32"),
        (False, True, "cpu", "float32"),
        (True, True, "mps", "float32"),
    ],
)
def test_bfloat16_is_chosen_where_the_processor_is_made_for_it(monkeypatch, avx512, library, device, chosen):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: library)
    assert utils_machine.choose_dtype("auto", torch.device(device)) == getattr(torch, chosen)
    assert utils_machine.choose_dtype("float32", torch.device(device)) == torch.float32


@pytest.mark.parametrize("name", ["cuda:77", "auto"])
def test_a_device_that_does_not_work_is_refused_with_its_reason(monkeypatch, capsys, name):
    def broken(*args, device, **kwargs):
        raise torch.OutOfMemoryError(f"no room on {device}. Try this\nand more")

    monkeypatch.setattr(utils_machine.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(utils_machine.torch, "empty", broken)
    monkeypatch.setattr(main, "DEVICE", main.DEVICE)  # undone after the test
    monkeypatch.setattr(sys, "argv", ["main.py", f"--DEVICE={name}"])
    assert utils_config.run(main.main, vars(main)) == 2
    device = name.replace("auto", "cuda")
    told = f"error: DEVICE {device!r} cannot be used: no room on {device}; --DEVICE=cpu can\n"
    assert capsys.readouterr() == ("", told)


@pytest.fixture
def constants():
    """A copy of main's names that overrides may change."""
    return dict(vars(main))


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("--GAME=pong", "GAME", "pong"),
        ("--PRIORITIZED=True", "PRIORITIZED", True),
        ("--prioritized=false", "PRIORITIZED", False),
        ("--MAX_STEPS=20000", "MAX_STEPS", 20_000),
        ("--MAX_STEPS=20_000", "MAX_STEPS", 20_000),
        ("--MAX_STEPS=1e6", "MAX_STEPS", 1_000_000),
        ("--LEARNING_RATE=1", "LEARNING_RATE", 1.0),
        ("--learning_rate=1", "LEARNING_RATE", 1.0),
        ("--learning-rate=2.5e-4", "LEARNING_RATE", 2.5e-4),
    ],
)
def test_a_constant_is_overridden_from_the_command_line(constants, argument, name, value):
    utils_config.override(constants, [argument])
    assert constants[name] == value
    assert type(constants[name]) is type(value)


def test_a_value_may_follow_as_an_argument_of_its_own(constants):
    utils_config.override(constants, ["--GAME", "pong", "--SEED", "3"])
    assert (constants["GAME"], constants["SEED"]) == ("pong", 3)


@pytest.mark.parametrize("spelling", ["--help", "--Help", "-h"])
def test_help_lists_every_constant_with_its_comment_and_default(constants, capsys, spelling):
    with pytest.raises(SystemExit) as stop:
        utils_config.override(constants, [spelling])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in utils_config.types(constants):
        assert f"--{name} " in text
    source = Path(main.__file__).read_text()
    comments = dict(re.findall(r"^([A-Z_]+): .*#\s*(.*)$", source, re.MULTILINE))
    assert comments.keys() == utils_config.types(constants).keys()
    for comment in comments.values():
        assert comment in text
    assert "[breakout]" in text
    assert "[0.00015]" in text
    assert "[10_000_000]" in text
    assert "[]" not in text


BAD = [
    (["--LEARNING_RAT=1"], "LEARNING_RATE"),
    (["--FOO=1"], "FOO"),
    (["-x"], "x"),
    (["stray"], "stray"),
    (["--GAME"], "GAME"),
    (["--MAX_STEPS=many"], "MAX_STEPS must be a whole number, not 'many'"),
    (["--MAX_STEPS=1.5"], "MAX_STEPS must be a whole number"),
    (["--MAX_STEPS=inf"], "MAX_STEPS must be a whole number"),
    (["--PRIORITIZED=1"], "PRIORITIZED must be True or False"),
    (["--GAMMA=high"], "GAMMA must be a number"),
    (["--GAME=brekout"], "'breakout'"),
    (["--GAME=joust"], "two players"),
    (["--GAME="], "GAME needs a value: --GAME=..."),
    (["--PRIORITIZED"], "PRIORITIZED needs a value: --PRIORITIZED=..."),
    (["--THREADS=-1"], "THREADS must be from 0 to 1024"),
    (["--WARM_STEPS=1_000_000"], "WARM_STEPS (1000000) must be below MEM_SIZE"),
    (["--BATCH_SIZE=600", "--WARM_STEPS=500"], "BATCH_SIZE (600) must not be above WARM_STEPS (500)"),
    (["--N_STEP=0"], "N_STEP must be at least 1"),
    (["--AVERAGE_STEPS=0"], "AVERAGE_STEPS must be at least 1"),
    (["--NUM_ENVS=0"], "NUM_ENVS must be at least 1"),
    (["--POLICY_UPDATE=0"], "POLICY_UPDATE must be at least 1"),
    (["--EVAL_EPISODES=0"], "EVAL_EPISODES must be at least 1"),
    (["--MEM_SIZE=200", "--WARM_STEPS=64", "--NUM_ENVS=50"], "MEM_SIZE (200) is too small for NUM_ENVS (50)"),
    (["--WARM_STEPS=33"], "WARM_STEPS (33) is too small for NUM_ENVS"),
    (["--EPS_START=1.1"], "EPS_START must be from 0 to 1"),
    (["--EPS_END=-0.1"], "EPS_END must be from 0 to 1"),
    (["--EPS_START=0.1", "--EPS_END=0.2"], "EPS_END (0.2) must not be above EPS_START (0.1)"),
    (["--EVAL_EPS=nan"], "EVAL_EPS must be from 0 to 1"),
    (["--EVAL_FRAMES=39"], "EVAL_FRAMES must be at least 40"),
    (["--REPEAT_ACTION_PROBABILITY=1"], "REPEAT_ACTION_PROBABILITY must be at least 0 and below 1, not 1.0"),
    (["--GAMMA=2"], "GAMMA must be from 0 to 1"),
    (["--ALPHA=-1"], "ALPHA must be from 0 to 1"),
    (["--BETA_START=7"], "BETA_START must be from 0 to 1"),
    (["--LEARNING_RATE=0"], "LEARNING_RATE must be a positive number"),
    (["--LEARNING_RATE_END_FACTOR=0"], "LEARNING_RATE_END_FACTOR must be above 0 and at most 1, not 0.0"),
    (["--LEARNING_RATE_END_FACTOR=1.1"], "LEARNING_RATE_END_FACTOR must be above 0 and at most 1, not 1.1"),
    (["--LEARNING_RATE_DECAY=0"], "LEARNING_RATE_DECAY must be at least 1, not 0"),
    (["--ADAM_EPS=nan"], "ADAM_EPS must be a positive number"),
    (["--SEED=-1"], "SEED must be from 0"),
    (["--EVALUATE_FREQ=3"], "EVALUATE_FREQ (3) must be at least NUM_ENVS"),
    (["--NUM_ENVS=4", "--CHECKPOINT_FREQ=7"], "CHECKPOINT_FREQ (7) must be at least twice NUM_ENVS (4)"),
    (["--PRECISION=float8"], "PRECISION must be one of"),
    (["--DEVICE=tpu"], "DEVICE 'tpu'"),
    (["--DEVICE=meta"], "DEVICE 'meta'"),
    (["--QUANTILES=8000"], "QUANTILES must be at most 1000"),
    (["--ATOMS=8000"], "ATOMS must be at most 1000"),
    (["--ATOMS=0"], "ATOMS must be at least 1"),
    (["--QUANTILES=2", "--ATOMS=2"], "QUANTILES (2) or ATOMS (2) must be 1"),
    (["--V_MAX=0"], "V_MAX must be from 0.001 to 1_000_000"),
    (["--V_MAX=1e7"], "V_MAX must be from 0.001 to 1_000_000"),
    (["--NUM_ENVS=20_000"], "NUM_ENVS must be at most 4096"),
    (["--STACK_SIZE=290"], "STACK_SIZE must be at most 64"),
    (["--FRAME_SKIP=100_000"], "FRAME_SKIP must be at most 60"),
    (["--TARGET_UPDATE=31"], "TARGET_UPDATE (31) must be at least NUM_ENVS (32)"),
    (["--SAVE_PREFIX=" + 300 * "x"], "cannot write to xxx"),
    (
        ["--MEM_SIZE=1e12", "--PRIORITIZED=False", "--MAX_STEPS=1e9"],
        "the replay memory for 1,000,000,224 steps: 7063.",  # a shorter run keeps no more than all of it
    ),
    (["--MEM_SIZE=1e9", "--PRIORITIZED=False", "--MAX_STEPS=1e9"], "the replay memory for 1,000,000,000 steps: 7063."),
    (["--MAX_STEPS=2e9"], "MAX_STEPS must be at most 1000000000, not 2000000000"),
    (["--MEM_SIZE=1e12", "--PRIORITIZED=True", "--MAX_STEPS=1e9"], "the replay memory for 1,000,000,224 steps: 707"),
    (["--TARGET_UPDATE=1_000_000_000_001"], "TARGET_UPDATE must be at most 10**12"),
    ([f"--BETA_STEPS=1{400 * '0'}"], "BETA_STEPS must be at most 10**12"),
    (["--PLAY=nowhere"], "cannot read nowhere: No such file or directory"),
    (["--PLAY="], "PLAY needs a value: --PLAY=..."),
    (["--lr=1e-4"], "there is no constant LR; --help lists them all"),
    (["-help"], "there is no constant -help"),
    (["--"], "cannot make sense of '--'"),
    (["--SAVE_PREFIX=/proc/nowhere"], "cannot write to /proc/nowhere"),
]


@pytest.mark.parametrize(("arguments", "sentence"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_line_on_stderr_and_status_2(monkeypatch, tmp_path, capsys, constants, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py", "--MEM_SIZE=100_000", *arguments])  # fits any machine
    monkeypatch.setattr(utils_memory.torch, "zeros", forbidden)  # nothing is allocated before all is checked
    for name in utils_config.types(constants):  # undone after the test
        monkeypatch.setattr(main, name, getattr(main, name))
    assert utils_config.run(main.main, vars(main)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert sentence in output.err
    assert list(tmp_path.iterdir()) == []


def forbidden(*args, **kwargs):
    """An allocation that must not happen."""
    raise AssertionError("allocated before the constants were checked")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("MAX_STEPS", 1.5e6 + 0.5, "MAX_STEPS must be a whole number, not 1500000.5"),
        ("MAX_STEPS", float("inf"), "MAX_STEPS must be a whole number, not inf"),
        ("GAME", 5, "GAME must be a text, not 5"),
        ("GAME", "", "GAME: the name of the game is empty"),
        ("PRIORITIZED", 1, "PRIORITIZED must be True or False, not 1"),
        ("MAX_STEPS", "10", "MAX_STEPS must be a whole number, not '10'"),
        ("SEED", None, "SEED must be a whole number, not None"),
        ("SEED", True, "SEED must be a whole number, not True"),
        ("GAMMA", "1", "GAMMA must be a number, not '1'"),
    ],
)
def test_a_constant_edited_to_what_cannot_be_is_refused(monkeypatch, capsys, name, value, sentence):
    monkeypatch.setattr(main, name, value)
    with pytest.raises(utils_config.ConfigError, match=re.escape(sentence)):
        utils_config.check(vars(main))
    for arguments in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
        if sentence.startswith("GAME:") and arguments:  # which is no question of types
            continue
        assert utils_config.run(main.main, vars(main)) == 2
        assert capsys.readouterr() == ("", f"error: {sentence}\n")


def test_a_whole_number_may_be_edited_to_stand_as_1e6(monkeypatch):
    monkeypatch.setattr(main, "MAX_STEPS", 1e6)
    monkeypatch.setattr(main, "GAMMA", 1)
    utils_config.check(vars(main))
    assert (main.MAX_STEPS, main.GAMMA) == (1_000_000, 1.0)
    assert (type(main.MAX_STEPS), type(main.GAMMA)) == (int, float)


def test_a_constant_that_lost_its_type_is_told(monkeypatch):
    monkeypatch.delitem(main.__annotations__, "DOUBLE_DQN")
    with pytest.raises(utils_config.ConfigError, match=r"DOUBLE_DQN has no type .* DOUBLE_DQN: bool = True"):
        utils_config.check(vars(main))


def test_a_constant_of_a_type_that_has_no_spelling_is_told(monkeypatch):
    monkeypatch.setitem(main.__annotations__, "EXTRA", int | None)
    with pytest.raises(utils_config.ConfigError, match=r"EXTRA must be annotated with one of .*, not with int \| None"):
        utils_config.check(vars(main))


def test_a_constant_that_was_renamed_is_missed(monkeypatch):
    monkeypatch.delitem(main.__annotations__, "N_STEP")
    monkeypatch.delattr(main, "N_STEP")
    with pytest.raises(utils_config.ConfigError, match=r"main\.py has no constant N_STEP any more"):
        utils_config.check(vars(main))


def test_a_memory_that_does_not_fit_names_needed_and_free_and_what_would_fit(monkeypatch):
    cpu, memory = torch.device("cpu"), utils_memory.ReplayMemory
    monkeypatch.setattr(utils_machine, "free_bytes", lambda device: 1_500_000_000)
    with pytest.raises(utils_config.ConfigError, match=r"0\.71 GB on cpu, 1\.50 GB free.* --MEM_SIZE=60_000"):
        utils_machine.choose_storage(cpu, memory, 100_000, 32)
    assert utils_machine.choose_storage(cpu, memory, 60_000, 32)[0] == cpu
    monkeypatch.setattr(utils_machine, "free_bytes", lambda device: 1_000_000_000)
    with pytest.raises(utils_config.ConfigError, match="or lower MEM_SIZE"):
        utils_machine.choose_storage(cpu, memory, 100_000, 32)


def test_what_would_fit_is_told_of_the_place_with_the_most_room(monkeypatch):
    free = {"cuda": 80e9, "cpu": 16e9}
    monkeypatch.setattr(utils_machine, "free_bytes", lambda device: int(free[device.type]))
    cuda, memory = torch.device("cuda"), utils_memory.ReplayMemory
    with pytest.raises(utils_config.ConfigError, match=r"141\.\d+ GB on cuda, 80\.00 GB free.* --MEM_SIZE=11_170_000"):
        utils_machine.choose_storage(cuda, memory, 20_000_000, 32)
    assert utils_machine.choose_storage(cuda, memory, 11_170_000, 32)[0] == cuda
    free |= {"cuda": 5e9}
    assert utils_machine.choose_storage(cuda, memory, 1_000_000, 32)[0] == torch.device("cpu")
    with pytest.raises(utils_config.ConfigError, match=r" GB on cpu, 16\.00 GB free.* --MEM_SIZE=2_110_000"):
        utils_machine.choose_storage(cuda, memory, 20_000_000, 32)


@pytest.mark.parametrize(
    ("group", "files", "free"),
    [
        ("0::/", {}, 8_000),
        ("0::/", {"": ("max", 5_000, 0)}, 8_000),
        ("0::/", {"": (6_000, 5_000, 1_000)}, 2_000),
        ("0::/job/step", {"": ("max", 7_000, 0), "job": (4_000, 3_500, 500), "job/step": ("max", 3_000, 0)}, 1_000),
        ("0::/elsewhere", {"": (6_000, 1_000, 0)}, 5_000),  # a container's own root
        ("3:cpu:/a\n2:memory:/job", {"memory": (2**63 - 1, 0, 0), "memory/job": (4_000, 1_500, 500)}, 3_000),
        ("2:memory,hugetlb:/", {"memory": (4_000, 1_500, 0)}, 2_500),
        (None, {}, 8_000),
    ],
)
def test_free_memory_is_what_the_machine_and_every_control_group_above_leave(monkeypatch, tmp_path, group, files, free):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9999 kB\nMemAvailable: 8000 kB\n")
    if group:
        (tmp_path / "proc" / "self" / "cgroup").write_text(f"9:name=systemd:/\n{group}\n")
    old = any(place.startswith("memory") for place in files)
    names = ("limit_in_bytes", "usage_in_bytes") if old else ("max", "current")
    for place, (limit, usage, cache) in files.items():
        directory = tmp_path / "sys" / "fs" / "cgroup" / place
        directory.mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, (limit, usage), strict=True):
            (directory / f"memory.{name}").write_text(f"{value if value == 'max' else 1024 * value}\n")
        (directory / "memory.stat").write_text(f"anon 5\n{'total_' * old}inactive_file {1024 * cache}\n")
    monkeypatch.setattr(utils_machine.resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, 0))
    assert utils_machine.free_bytes(torch.device("cpu"), tmp_path) == 1024 * free
    (tmp_path / "proc" / "self" / "statm").write_text("3 2 1 1 0 1 0\n")  # pages
    limit = 3 * os.sysconf("SC_PAGE_SIZE") + 900 * 1024
    monkeypatch.setattr(utils_machine.resource, "getrlimit", lambda _: (limit, limit))
    assert utils_machine.free_bytes(torch.device("cpu"), tmp_path) == 900 * 1024


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/", {}, 8),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "350000 100000"}, 3),
        ("0::/", {"cpu.max": "1600000 100000"}, 8),
        ("0::/job/step", {"cpu.max": "max 100000", "job/cpu.max": "50000 100000", "job/step/cpu.max": "max 9"}, 1),
        ("0::/elsewhere", {"cpu.max": "20000 10000"}, 2),
        ("2:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("2:cpu,cpuacct:/job", {"cpu/job/cpu.cfs_quota_us": "400000", "cpu/job/cpu.cfs_period_us": "100000"}, 4),
        ("2:cpuacct:/\n3:cpuset:/", {"cpu.max": "100000 100000"}, 8),
        (None, {}, 8),
    ],
)
def test_a_quota_counts_as_so_many_cores_whichever_control_group_above_has_it(
    monkeypatch, tmp_path, group, files, cores
):
    monkeypatch.setattr(utils_machine.os, "sched_getaffinity", lambda _: range(8), raising=False)
    (tmp_path / "proc" / "self").mkdir(parents=True)
    if group:
        (tmp_path / "proc" / "self" / "cgroup").write_text(f"9:name=systemd:/\n{group}\n")
    for name, content in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    assert utils_machine.count_cores(tmp_path) == cores


@pytest.mark.parametrize(("device", "cores", "threads"), [("cuda", 16, 15), ("cuda", 4, 4), ("cpu", 16, 16)])
def test_many_cores_leave_one_to_the_thread_that_feeds_a_gpu(monkeypatch, device, cores, threads):
    monkeypatch.setattr(utils_machine, "count_cores", lambda: cores)
    assert utils_machine.choose_emulator_threads(torch.device(device)) == threads


@pytest.mark.parametrize(
    ("device", "threads", "cores", "used"),
    [("cuda", 0, 2, 1), ("cuda", 3, 2, 3), ("cpu", 0, 2, 2), ("cpu", 0, 1, 1), ("cpu", 0, 9, 2), ("cpu", 3, 2, 3)],
)
def test_the_learner_has_one_thread_beside_a_gpu_else_no_more_than_the_cores(monkeypatch, device, threads, cores, used):
    monkeypatch.setattr(utils_machine, "count_cores", lambda: cores)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)  # undone after the test
    monkeypatch.setattr(utils_machine, "keep_freed_memory", lambda: None)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert utils_machine.prepare(torch.device(device), "bfloat16", threads) == torch.bfloat16
        assert torch.get_num_threads() == used
    finally:
        torch.set_num_threads(before)


def test_earlier_results_are_never_overwritten(monkeypatch, tiny_run):
    run = tiny_run(**TABLE, MAX_STEPS=8)
    (run.directory / "run.json").unlink()
    before = {path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()}
    with pytest.raises(utils_config.ConfigError, match=r"rewards\.txt is from another run"):
        main.main()
    (run.directory / "rewards.txt").rename(run.directory / "kept.txt")
    with pytest.raises(utils_config.ConfigError, match="checkpoint_0000000008 is from another run"):
        main.main()
    (run.directory / "kept.txt").rename(run.directory / "rewards.txt")
    assert {path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()} == before


def test_pictures_of_an_earlier_run_are_not_mixed_with_new_ones(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval_003").mkdir()
    with pytest.raises(utils_config.ConfigError, match="eval_003 is from another run"):
        main.main()


def test_the_smallest_memory_that_is_accepted_survives_the_restarts_at_checkpoints(tiny_run):
    small = {"NUM_ENVS": 2, "N_STEP": 3, "WARM_STEPS": 8, "PRIORITIZED": True, "POLICY_UPDATE": 1, "EVALUATE_FREQ": 400}
    with pytest.raises(utils_config.ConfigError, match=r"MEM_SIZE \(17\) is too small .* it must be at least 18"):
        tiny_run(**small, MEM_SIZE=17)
    assert tiny_run(**small, MEM_SIZE=18, CHECKPOINT_FREQ=50).models == ["model_000", "model_001"]


@pytest.mark.parametrize(("frames", "enough"), [(18_000, 4_500), (2_000, 500), (108_000, 27_000), (10**6, 27_000)])
def test_games_that_never_get_far_are_told(frames, enough):
    def introduce(steps: int, each: int) -> str:
        constants = {"MAX_STEPS": steps, "CHECKPOINT_FREQ": 4 * each, "NUM_ENVS": 4, "EVAL_FRAMES": frames}
        return utils_log.introduction(vars(main) | constants, torch.device("cpu"), "")

    told = f"starts anew after {enough - 1:,} steps of its own, so its later part is never seen: raise"
    assert told in introduce(200_000, enough - 1)
    assert "starts anew" not in introduce(200_000, enough)  # as long as a game may last, in evaluations or at all
    assert "starts anew" not in introduce(4 * (enough - 1), enough - 1)  # over before


def test_writing_a_checkpoint_is_told(tiny_run, capsys):
    tiny_run(**TABLE, CHECKPOINT_FREQ=200)
    assert "step 200 of 400: writing a checkpoint" in capsys.readouterr().err


def test_a_run_too_short_to_learn_says_so(monkeypatch, tiny_run, capsys):
    updates = []
    noted(monkeypatch, main.Agent, "learn", lambda *_: updates.append(1))
    # Of four games; 108 ends the first iteration that may learn, and 120 the first that completes 20 steps after it.
    for every, steps in ((4, 104), (4, 105), (20, 116), (20, 117)):
        for warm in (97, 100):
            tiny_run(**TABLE, WARM_STEPS=warm, MAX_STEPS=steps, POLICY_UPDATE=every)
            sentence = f"nothing will be learned: MAX_STEPS ({steps}) ends before an update after WARM_STEPS ({warm})"
            told = sentence in capsys.readouterr().err
            assert (told, len(updates)) == ((False, 1) if steps in (105, 117) else (True, 0))
            updates.clear()


def test_free_memory_is_between_nothing_and_what_the_machine_has():
    free = utils_machine.free_bytes(torch.device("cpu"))
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_importing_main_starts_nothing():
    imported = subprocess.run(
        [sys.executable, "-c", "import main"],
        cwd=Path(main.__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (imported.returncode, imported.stdout, imported.stderr) == (0, "", "")


def test_a_model_loads_into_an_agent_and_names_its_game_and_score(tiny_run):
    run = tiny_run(MAX_STEPS=8, FRAME_SKIP=5)
    agent = utils_drl.Agent(4)
    about = agent.load(run.directory / "models" / "model_000")
    assert f"{np.mean(about['scores']):.1f}" == run.lines[0].split()[2]
    assert about["step"] == 0
    assert AtariEnv(num_envs=1, **about["rules"]).rules == about["rules"]
    assert (about["rules"]["game"], about["rules"]["frame_skip"]) == ("breakout", 5)


@pytest.mark.parametrize("game", ["seaquest", "montezuma_revenge"])
@pytest.mark.filterwarnings("error")
def test_any_game_trains_without_a_warning(tiny_run, game):
    run = tiny_run(GAME=game, MAX_STEPS=2_000, WARM_STEPS=1_000, MEM_SIZE=1_600, EVALUATE_FREQ=2_000)
    assert len(run.lines) == 2
