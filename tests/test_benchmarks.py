"""The benchmarks run the real loop: they must not fall behind it."""

import csv
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import main
import utils_config
import utils_machine
from utils_drl import Agent
from utils_env import AtariEnv
from utils_memory import PrioritizedReplayMemory, ReplayMemory

BENCHMARKS = Path(main.__file__).parent / "benchmarks"
SMALL = {
    "NUM_ENVS": 4,
    "WARM_STEPS": 100,
    "MEM_SIZE": 300,
    "TARGET_UPDATE": 100,
    "POLICY_UPDATE": 20,
    "BATCH_SIZE": 4,
    "EVAL_EPISODES": 1,
    "EVAL_EPS": 1.0,
    "PRECISION": "float32",
    "DEVICE": "cpu",
    "THREADS": 1,
}
TINY = [f"--{name}={value}" for name, value in SMALL.items()]


@pytest.fixture
def benchmark(monkeypatch):
    """A function that imports a benchmark by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def throughput(benchmark, monkeypatch, tmp_path):
    """A function that runs the throughput benchmark with a command line, on little of everything, under tmp_path."""
    module = benchmark("throughput")
    for name, value in {"WINDOW": 0.05, "WARM": 500, "SLOTS": (1_000, 2_000)}.items():
        monkeypatch.setattr(module, name, value)
    for name in utils_config.types(vars(main)):
        monkeypatch.setattr(main, name, getattr(main, name))  # undone after the test
    monkeypatch.chdir(tmp_path)

    def start(*arguments: str) -> None:
        small = [
            "--MEM_SIZE=10_000",
            "--WARM_STEPS=1_000",
            "--NUM_ENVS=4",
            "--POLICY_UPDATE=40",
            "--BATCH_SIZE=4",
            "--DEVICE=cpu",
            "--THREADS=1",
        ]
        monkeypatch.setattr(sys, "argv", ["throughput.py", "--rounds=1", *small, *arguments])
        module.bench()

    return start


def test_the_throughput_benchmark_prints_its_table_and_writes_every_figure(throughput, tmp_path, capsys):
    throughput("--json=figures.json")
    figures = json.loads(Path("figures.json").read_text())
    parts = ["emulators", "acting", "learner_uniform", "learner_prioritized", "loop_uniform", "loop_prioritized"]
    table = capsys.readouterr().out
    for part in parts:
        assert figures[part]["steps_per_s"] > 0
        assert f"{part} " in table
    loops = [figures[part]["steps_per_s"] for part in ("loop_prioritized", "loop_uniform")]
    assert figures["ratios"]["prioritized / uniform, loop"] == pytest.approx(loops[0] / loops[1])
    assert list(figures["memory_microseconds"]) == ["1000", "2000"]
    assert figures["constants"]["POLICY_UPDATE"] == 40
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_the_throughput_benchmark_measures_only_what_it_is_asked_for_and_restores_the_constants(
    benchmark, throughput, monkeypatch, tmp_path, capsys
):
    module, unchanged = benchmark("throughput"), []
    loop = module.loop

    def watched(*arguments) -> float:
        before = dict(vars(main))
        rate = loop(*arguments)
        unchanged.append(dict(vars(main)) == before)
        return rate

    monkeypatch.setattr(module, "loop", watched)
    monkeypatch.setattr(main, "SAVE_PREFIX", str(tmp_path / "mine"))
    throughput("--json=figures.json", "--only", "loop_uniform", "loop_prioritized")
    assert unchanged == [True, True]
    assert not (tmp_path / "mine").exists()
    figures, table = json.loads(Path("figures.json").read_text()), capsys.readouterr().out
    assert {name for name, value in figures.items() if "steps_per_s" in value} == {"loop_uniform", "loop_prioritized"}
    assert list(figures["ratios"]) == ["prioritized / uniform, loop"]
    assert figures["memory_microseconds"] == {}
    assert "microseconds" not in table
    with pytest.raises(SystemExit, match="2"):
        throughput("--only", "loop")
    assert "error: --only loop: the parts are emulators, acting," in capsys.readouterr().err


def test_the_throughput_benchmark_measures_the_loop_of_a_model_with_the_threads_it_is_asked_for(
    benchmark, throughput, monkeypatch, capsys
):
    module, begun = benchmark("throughput"), []

    class Begun(module.Stopwatch):
        def __init__(self, run, env, agent, *others):
            super().__init__(run, env, agent, *others)
            weights = {name: weight.clone() for name, weight in agent.policy.state_dict().items()}
            begun.append((env.num_threads, weights))

    trained, other = Agent(4, seed=7), Agent(4, dueling=True)
    for name, agent in {"trained": trained, "other": other}.items():
        agent.save(name)
    monkeypatch.setattr(module, "Stopwatch", Begun)
    monkeypatch.setattr(utils_machine, "choose_emulator_threads", utils_machine.choose_emulator_threads)  # undone after
    throughput("--only", "loop_prioritized", "--model=trained", "--emulator-threads=3", "--json=figures.json")
    ((threads, weights),) = begun
    assert threads == 3 == json.loads(Path("figures.json").read_text())["machine"]["emulator_threads"]
    torch.testing.assert_close(weights, trained.policy.state_dict(), rtol=0, atol=0)
    for option, reason in {
        "--model=other": "other holds a network of ",
        "--model=none": "No such file or directory",
        "--emulator-threads=0": "error: --emulator-threads 0: there must be at least 1",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            throughput(option)
        assert reason in capsys.readouterr().err.splitlines()[-1]


def test_the_throughput_benchmark_looks_for_room_before_it_begins(throughput, monkeypatch, capsys):
    monkeypatch.setattr(utils_machine.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e9, 9e9, 1e8))
    with pytest.raises(SystemExit, match="2"):
        throughput()
    assert "error: checkpoints: up to " in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def learning(benchmark, monkeypatch):
    """The learning benchmark, looking often and evaluating briefly."""
    module = benchmark("learning")
    monkeypatch.setattr(module, "LOOK", 0.02)
    monkeypatch.setattr(module, "STRICT_GAMES", 2)
    return module


@pytest.fixture
def bench(learning, monkeypatch, tmp_path):
    """A function that runs the learning benchmark with a command line, results under tmp_path."""

    def start(*arguments: str) -> int:
        places = [f"--out={tmp_path / 'runs'}", f"--summary={tmp_path / 'summary.csv'}"]
        monkeypatch.setattr(sys, "argv", ["learning.py", *arguments, *places])
        return learning.bench()

    return start


def stand_in(learning, monkeypatch, tmp_path, code: str) -> None:
    """Let `code` be what main.py does: `rows(...)` writes rows of rewards.txt, with scores, and their models."""
    prelude = """
import os, sys, time
from pathlib import Path
def rows(*numbers):
    Path("models").mkdir(exist_ok=True)
    for number in numbers:
        with open("rewards.txt", "a") as file:
            file.write(f"{number:3d} {number * 100:8d} {number + seed:.1f}\\n")
        Path(f"models/model_{number:03d}").touch()
seed = next(int(a.split("=")[1]) for a in sys.argv if a.startswith("--SEED"))
"""
    (tmp_path / "main.py").write_text(prelude + code)
    monkeypatch.setattr(learning, "ROOT", tmp_path)
    monkeypatch.setattr(learning, "evaluate", lambda run, steps: None)


def record(tmp_path: Path, run: str) -> dict:
    """The learning.json of `run`."""
    return json.loads((tmp_path / "runs" / run / "learning.json").read_text())


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    return list(csv.DictReader(path.read_text().splitlines()))


def test_real_runs_become_curves_strict_scores_a_table_and_rows_of_the_summary_and_are_done_only_once(
    bench, learning, monkeypatch, tmp_path, capsys
):
    command = ["--recipes", "shipped", "double", "--steps=400", "--every=200", "--at=200", "--until=breakout=-1"]
    name = learning.label("shipped", TINY)
    old = ['other,pong,400,1,1,1,1,1,"a, b"', f"{name},breakout,400,9,9,9,9,9,x", ""]
    header = "recipe,game,steps,seeds,mean,low,high,minutes,hardware"
    (tmp_path / "summary.csv").write_text("\n".join([header, *old]))
    assert bench(*command, *TINY) == 0
    runs = [tmp_path / "runs" / name for name in ("double-breakout-0", "shipped-breakout-0")]
    names = [learning.label(recipe, TINY) for recipe in ("double", "shipped")]
    curve = rows(tmp_path / "runs" / "curves.csv")
    for run, name in zip(runs, names, strict=True):
        mine = [row for row in curve if row["recipe"] == name]
        said = [line.split() for line in (run / "rewards.txt").read_text().splitlines()]
        assert [[row["number"], row["step"], row["score"]] for row in mine] == said
        minutes = [float(row["minutes"]) for row in mine]
        assert 0 < minutes[0] <= minutes[1] <= minutes[2] < 5
    assert (tmp_path / "runs" / "curves.png").read_bytes().startswith(b"\x89PNG")
    strict = json.loads((runs[1] / "strict_002.json").read_text())
    assert [len(strict["scores"][epsilon]) for epsilon in ("0.05", "0.01")] == [2, 2]

    summary = rows(tmp_path / "summary.csv")
    keys = [(row["recipe"], row["game"], row["steps"]) for row in summary]
    assert keys == [(name, "breakout", steps) for steps in ("200", "400") for name in names] + [
        ("other", "pong", "400")
    ]
    assert summary[4]["hardware"] == "a, b"
    assert summary[3]["seeds"] == "1"
    assert float(summary[3]["mean"]) == pytest.approx(np.mean(strict["scores"]["0.05"]), abs=0.051)
    assert "cores" in summary[3]["hardware"]
    table = capsys.readouterr().out
    assert table == (tmp_path / "runs" / "table.md").read_text()
    assert table.count("| -1 | 0 | 0.") == 4  # this score is reached at once

    before = {path: path.stat().st_mtime_ns for run in runs for path in run.rglob("*")}
    monkeypatch.delattr(subprocess, "Popen")
    assert bench(*command, *TINY) == 0
    assert {path: path.stat().st_mtime_ns for path in before if path.name != "learning.json"} == {
        path: time for path, time in before.items() if path.name != "learning.json"
    }
    assert rows(tmp_path / "summary.csv") == summary


def test_tables_name_a_run_by_the_constants_too_that_change_what_it_learns(bench, learning, monkeypatch, tmp_path):
    stand_in(learning, monkeypatch, tmp_path, "rows(0, 1, 2)")
    more = ["--N_STEP=2", "--target-update=10_000", "--THREADS=1", "--EVAL_EPS=0.05"]
    assert bench("--recipes", "double", "--steps=200", "--every=100", *more) == 0
    assert record(tmp_path, "double-breakout-0")["recipe"] == "double TARGET_UPDATE=10000 N_STEP=2"
    path = tmp_path / "runs" / "double-breakout-0" / "learning.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recipe": "double"}))  # as it once was called
    assert bench("--recipes", "double", "--steps=200", "--every=100", *more) == 0
    assert record(tmp_path, "double-breakout-0")["recipe"] == "double TARGET_UPDATE=10000 N_STEP=2"


def test_a_run_that_fails_is_reported_with_its_last_words_and_the_others_go_on(
    bench, learning, monkeypatch, tmp_path, capsys
):
    stand_in(learning, monkeypatch, tmp_path, "rows(0)\nif seed == 1: sys.exit('error: out of luck')\nrows(1, 2)")
    assert bench("--seeds", "1", "2", "--steps=200", "--every=100", *TINY) == 1
    assert "shipped-breakout-1 failed (1): error: out of luck" in capsys.readouterr().err
    assert list(record(tmp_path, "shipped-breakout-1")["reached"]) == ["0"]
    assert list(record(tmp_path, "shipped-breakout-2")["reached"]) == ["0", "1", "2"]


def test_an_unfinished_run_is_started_again_in_its_place_and_its_clock_goes_on(bench, learning, monkeypatch, tmp_path):
    code = """
Path("arguments").open("a").write(repr(sys.argv[1:]) + "\\n")
time.sleep(0.3)
if not Path("rewards.txt").exists():
    rows(0, 1)
    sys.exit("killed")
Path("rewards.txt").unlink()  # as a resumed run that goes back to its checkpoint
rows(0)
time.sleep(0.3)
rows(1, 2)
"""
    stand_in(learning, monkeypatch, tmp_path, code)
    command = ["--steps=200", "--every=100", *TINY]
    assert bench(*command, "--THREADS=2") == 1
    first = record(tmp_path, "shipped-breakout-0")
    path = tmp_path / "runs" / "shipped-breakout-0" / "learning.json"
    path.write_text(json.dumps(first | {"started": first["started"] - 3600}))  # the hour since then is not the run's
    assert bench(*command, "--THREADS=3", "--games=ALE/Breakout-v5") == 0
    second = record(tmp_path, "shipped-breakout-0")
    assert {number: second["reached"][number] for number in ("0", "1")} == first["reached"]
    assert first["clock"] + 0.5 < second["reached"]["2"] < first["clock"] + 60
    assert (first["constants"]["THREADS"], second["constants"]["THREADS"]) == (2, 3)
    arguments = (tmp_path / "runs" / "shipped-breakout-0" / "arguments").read_text().splitlines()
    assert len(arguments) == 2
    assert arguments[0].replace("THREADS=2", "THREADS=3") == arguments[1]


def test_a_finished_run_goes_on_when_more_steps_are_asked_for(bench, learning, monkeypatch, tmp_path):
    code = """
last = int(next(argument for argument in sys.argv if "MAX_STEPS" in argument).split("=")[1]) // 100
Path("rewards.txt").unlink(missing_ok=True)
rows(*range(last + 1))
"""
    stand_in(learning, monkeypatch, tmp_path, code)
    for steps, reached in [(200, ["0", "1", "2"]), (400, ["0", "1", "2", "3", "4"]), (200, ["0", "1", "2", "3", "4"])]:
        assert bench(f"--steps={steps}", "--every=100", *TINY) == 0
        assert list(record(tmp_path, "shipped-breakout-0")["reached"]) == reached


def test_jobs_work_side_by_side_with_one_thread_each_and_what_is_asked_for_twice_is_done_once(
    bench, learning, monkeypatch, tmp_path
):
    code = """
Path(f"../../here{seed}").touch(exist_ok=False)
while not all(Path(f"../../here{other}").exists() for other in (1, 2)): time.sleep(0.01)
assert "--THREADS=1" in sys.argv
assert "--SAVE_PREFIX=./models" in sys.argv  # where this script looks, whatever main.py says
rows(0, 1, 2)
"""
    stand_in(learning, monkeypatch, tmp_path, code)
    twice = ["--recipes", "shipped", "shipped", "--games", "breakout", "Breakout", "--seeds", "1", "2", "1"]
    assert bench(*twice, "--jobs=2", "--steps=200", "--every=100") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interruption_reaches_the_run_once_and_waits_for_it(tmp_path, number):
    (tmp_path / "main.py").write_text("""
import signal, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: open("signals", "a").write("SIGTERM "))
Path("ready").touch()
time.sleep(0.1)
while not Path("signals").exists(): time.sleep(0.01)
time.sleep(0.5)
open("signals", "a").write("saved")
""")
    program = tmp_path / "program.py"
    text = (BENCHMARKS / "learning.py").read_text()
    program.write_text(
        text.replace("ROOT = Path(main.__file__).parent", "ROOT = Path(__file__).parent").replace(
            "Path(__file__).resolve().parent.parent", f"Path({str(BENCHMARKS.parent)!r})"
        )
    )
    out = tmp_path / "runs"
    command = [sys.executable, str(program), f"--out={out}", *TINY]
    paths = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])
    child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True)
    directory = out / "shipped-breakout-0"
    while not (directory / "ready").exists():
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.02)
    if number == signal.SIGHUP:  # they come in pairs, and nobody reads what is said
        child.stderr.close()
        child.send_signal(number)
        time.sleep(0.2)
        child.send_signal(number)
        child.wait(timeout=20)
    else:
        child.send_signal(number)
        assert "the same command goes on" in child.communicate(timeout=20)[1]
    assert child.returncode == 130
    assert (directory / "signals").read_text() == "SIGTERM saved"
    assert json.loads((directory / "learning.json").read_text())["clock"] > 0.5


def test_every_recipe_is_one_that_main_accepts_and_the_classic_ones_do_not_follow_its_defaults(learning, monkeypatch):
    monkeypatch.setattr(main, "N_STEP", 3)
    monkeypatch.setattr(main, "LEARNING_RATE", 1e-3)
    monkeypatch.setattr(main, "LEARNING_RATE_END_FACTOR", 0.5)
    resolved = {name: learning.resolve(learning.flags(constants)) for name, constants in learning.RECIPES.items()}
    assert resolved["shipped"]["N_STEP"] == 3
    uniform, prioritized = resolved["classic-uniform"], resolved["classic-prioritized"]
    assert (uniform["N_STEP"], uniform["LEARNING_RATE"], uniform["PRIORITIZED"]) == (1, 6.25e-5, False)
    assert uniform["LEARNING_RATE_END_FACTOR"] == 1.0
    assert prioritized == uniform | {"PRIORITIZED": True}


def test_the_line_for_the_classic_recipe_in_the_readme_is_that_recipe(learning):
    readme = (learning.ROOT / "README.md").read_text()
    line = re.search(r"python \S+main\.py (--PRIORITIZED=False --DOUBLE_DQN=False[^`]*)```", readme)[1]
    arguments = line.replace("\\\n", " ").split()
    assert learning.resolve(arguments) == learning.resolve(learning.flags(learning.RECIPES["classic-uniform"]))


def test_no_recipe_is_there_twice(learning):
    resolved = [learning.resolve(learning.flags(constants)) for constants in learning.RECIPES.values()]
    assert all(resolved.count(constants) == 1 for constants in resolved)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--BATCH_SIZ=4"], "there is no constant BATCH_SIZ; the nearest is BATCH_SIZE"),
        (["--SEED=4"], "SEED is set by --games, --seeds"),
        (["--games", "brekout"], "is it 'breakout'"),
        (["--PRECISION=float8"], "PRECISION must be one of auto, float32, bfloat16, not 'float8'"),
        (["--at", "150"], "--at 150: there is an evaluation every 100 steps up to 200"),
        (["--steps=250"], "--steps 250 must be a multiple of --every 100"),
        (["--until", "breakout"], "invalid goal value: 'breakout'"),
        (["--until", "breakout=20", "Breakout=40"], "--until: one score per game"),
        (["--GAMMA=0.9"], "shipped-breakout-0 has GAMMA 0.99, not 0.9; choose another --out"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence_before_anything_starts(
    bench, learning, monkeypatch, tmp_path, capsys, arguments, sentence
):
    stand_in(learning, monkeypatch, tmp_path, "rows(0, 1, 2)")
    command = ["--steps=200", "--every=100", *TINY]
    assert bench(*command) == 0
    before = sorted((tmp_path / "runs").rglob("*"))
    with pytest.raises(SystemExit) as stop:
        bench(*command, *arguments)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
    assert sorted((tmp_path / "runs").rglob("*")) == before


def test_the_report_takes_means_intervals_and_times_over_the_seeds(benchmark, tmp_path):
    learning_report = benchmark("learning_report")
    games = ([16.1, 20.1], [21.1, 29.1])
    for seed, (shift, reached) in enumerate([(0.0, {"0": 6, "1": 60}), (4.0, {"0": 18, "1": 120})]):
        directory = tmp_path / "runs" / str(seed)
        directory.mkdir(parents=True)
        about = {"recipe": "full", "game": "breakout", "seed": seed, "reached": reached, "hardware": "a box"}
        (directory / "learning.json").write_text(json.dumps(about))
        (directory / "rewards.txt").write_text(f"  0        0 {1 + shift}\n  1      100 {10 + shift}\n")
        scores = {"0.05": games[seed], "0.01": [20.0, 20.0]}
        result = {"steps": 100, "number": 1, "scores": scores}
        (directory / "strict_001.json").write_text(json.dumps(result))
    learning_report.report(tmp_path / "runs", {"breakout": 11.0}, tmp_path / "summary.csv")
    assert rows(tmp_path / "summary.csv") == [
        dict(
            recipe="full",
            game="breakout",
            steps="100",
            seeds="2",
            mean="21.6",  # of 18.1 and 25.1, the means of the seeds, of which two draws are both the one or both the
            low="17.1",  # other in a quarter of all cases each; then 1 of 16 draws of four games is the worst, and 4
            high="27.1",  # are the next: the 2.5% at either end lie there
            minutes="1.5",
            hardware="a box",
        )
    ]
    line = (tmp_path / "runs" / "table.md").read_text().splitlines()[2]
    # median 20.6 of all games; (21.6 - 1.7) / (30.5 - 1.7) = 0.69; only one seed had 11.0 within the run
    assert line == "| breakout | 100 | full | 2 | 21.6 | 17.1 to 27.1 | 20.6 | 0.69 | 20.0 | 1.5 | 11 | - | - |"


@pytest.mark.parametrize(
    ("seeds", "games", "between", "within", "error"),
    [
        (1, 2_000, 0.0, 2.0, 2 / 2_000**0.5),  # one seed: its games
        (600, 3, 3.0, 0.0, 3 / 600**0.5),  # games all alike: the seeds
        (100, 20, 1.0, 4.0, (1 / 100 + 2 * 16 / 2_000) ** 0.5),  # both, the games twice
    ],
)
def test_the_interval_knows_the_spread_of_games_and_of_seeds(benchmark, seeds, games, between, within, error):
    normal = np.random.default_rng(0).normal
    scores = 5.0 + between * normal(size=(seeds, 1)) + within * normal(size=(seeds, games))
    low, high = benchmark("learning_report").interval(scores)
    assert (high + low) / 2 == pytest.approx(scores.mean(), abs=0.02)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_the_agent_whose_speed_is_measured_is_that_of_the_constants(benchmark, monkeypatch):
    constants = {"DUELING": True, "LAYER_NORM": True, "ATOMS": 5, "V_MAX": 3.0, "STACK_SIZE": 3, "DOUBLE_DQN": False}
    for name, value in constants.items():
        monkeypatch.setattr(main, name, value)
    agent = benchmark("throughput").make_agent(torch.device("cpu"))
    told = {"action_dim": 4, "stack_size": 3, "dueling": True, "layer_norm": True, "atoms": 5, "v_max": 3.0}
    assert agent.shape == told | {"quantiles": 1}
    assert not agent.double_dqn


@pytest.mark.parametrize("memory", [ReplayMemory, PrioritizedReplayMemory])
def test_the_learner_alone_is_measured_with_any_constants(benchmark, monkeypatch, memory):
    throughput = benchmark("throughput")
    monkeypatch.setattr(throughput, "WINDOW", 0.05)
    for name, value in {"STACK_SIZE": 3, "NUM_ENVS": 5, "MEM_SIZE": 200, "BATCH_SIZE": 4, "ATOMS": 5}.items():
        monkeypatch.setattr(main, name, value)
    assert throughput.learner(torch.device("cpu"), memory) > 0


def test_fit_teaches_a_network_what_another_one_makes_of_a_run_and_more_updates_teach_more(
    benchmark, monkeypatch, tmp_path, capsys
):
    fit = benchmark("fit")
    monkeypatch.chdir(tmp_path)
    small = SMALL | {"MAX_STEPS": 400, "EVALUATE_FREQ": 400, "CHECKPOINT_FREQ": 200, "N_STEP": 2}
    for name in utils_config.types(vars(main)):  # all of them, because fit.py sets what its recipes say
        monkeypatch.setattr(main, name, small.get(name, getattr(main, name)))
    main.main()
    monkeypatch.setattr(fit, "AFTER", (1,))
    monkeypatch.setattr(fit, "TEST", 200)
    models = tmp_path / "models"
    files = [str(models / "checkpoint_0000000400"), str(models / "model_001")]
    command = ["fit.py", *files, "--recipes", "layer-norm", "layer-norm-c51", "--updates=60", "--BATCH_SIZE=16"]
    monkeypatch.setattr(sys, "argv", command)
    fit.bench()
    heading, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert heading == ["updates", "1", "60"]
    assert [row[0] for row in rows] == ["layer-norm", "layer-norm-c51"]
    assert rows[0][1:] != rows[1][1:]
    assert all(float(last) < float(first) for _, first, last in rows)
    checkpoint, model = files
    for wrong, reason in [
        ([model, model], "model_001 is not a checkpoint"),
        (["none", model], "none is not a checkpoint"),
        ([checkpoint, checkpoint], "checkpoint_0000000400 is not a model"),
        ([checkpoint, "none"], "No such file or directory: 'none'"),
        ([checkpoint, model, "--DEVICE=tpu"], "DEVICE 'tpu' cannot be used: "),
    ]:
        monkeypatch.setattr(sys, "argv", ["fit.py", *wrong])
        with pytest.raises(SystemExit, match="2"):
            fit.bench()
        assert reason in capsys.readouterr().err.splitlines()[-1]


def test_a_lesson_is_worth_what_the_teacher_says_and_nothing_follows(benchmark):
    fit = benchmark("fit")
    memory = ReplayMemory(100, 2, n_step=2, gamma=0.5)
    env = AtariEnv("breakout", 2, num_threads=1)
    memory.push(env.reset(0)[1])
    for step in range(20):
        memory.push(env.step([step % 4] * 2)[1])
    teacher = Agent(4, seed=1)
    memory.reseed(3)
    plain = memory.sample(8, 2)
    memory.reseed(3)
    lesson = fit.Lesson(memory, teacher).sample(8, 2)
    assert torch.equal(lesson.indices, plain.indices)
    assert not lesson.discounts.any()
    expected = plain.returns + plain.discounts * teacher.values(plain.next_states).max(1).values
    torch.testing.assert_close(lesson.returns, expected)
    perfect = Agent(4, seed=1)
    targets = lesson._replace(returns=perfect.values(plain.states).gather(1, plain.actions[:, None]).squeeze(1))
    assert fit.unexplained(perfect, targets) == pytest.approx(0.0, abs=1e-6)
    assert fit.unexplained(Agent(4, seed=2), targets) > 0.1
