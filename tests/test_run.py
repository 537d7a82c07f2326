"""Runs that are killed, stopped, damaged or starved, and go on, or end with one sentence and nothing lost."""

import contextlib
import errno
import fcntl
import functools
import io
import json
import math
import os
import pickle
import pty
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import kill_test
import numpy as np
import pytest
import test_main
import torch
from test_main import TINY, Corridor

import main
import utils_config
import utils_files
import utils_log
import utils_machine
import utils_record
import utils_run
from utils_env import AtariEnv
from utils_memory import ReplayMemory

CPU = torch.device("cpu")
RUN = {**TINY, "CHECKPOINT_FREQ": 100, "PRIORITIZED": True, "POLICY_UPDATE": 4, "LEARNING_RATE": 1e-3, "STACK_SIZE": 1}
ATARI = {"AtariEnv": AtariEnv, "STACK_SIZE": 4}  # real games, where a run on disk is more than a run


class Killed(BaseException):
    """The process ends here; nothing in the program catches it."""


def run_in(directory: Path, **values) -> int:
    """Run main.py in a directory as from the shell, with games of a table, which start at once; its status."""
    return test_main.run_in(directory, **{"AtariEnv": Corridor, **RUN, **values})


@pytest.fixture
def run_main(capsys):
    """A function that runs main.py in a directory as from the shell; returns its status and what it told."""

    def run(directory: Path, **values) -> tuple[int, str]:
        capsys.readouterr()
        status = run_in(directory, **values)
        return status, capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A function that returns the directory, only to be read, of a run that was left alone with these constants."""

    @functools.cache
    def run(**values) -> Path:
        directory = tmp_path_factory.mktemp("alone")
        assert run_in(directory, **values) == 0
        return directory

    return run


def at_call(monkeypatch, owner: type, name: str, number: int, action) -> None:
    """Let call `number` of the method do `action` first."""
    original, calls = getattr(owner, name), iter(range(1, 1_000_000))

    def method(*args, **kwargs):
        if next(calls) == number:
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, method)


def kill() -> None:
    """End the process."""
    raise Killed


# Whole runs


def test_a_killed_run_ends_as_if_it_had_been_left_alone(monkeypatch, run_main, alone, tmp_path):
    for row in (3, 60, 30):  # before the first checkpoint; at step 232 and 316 of runs that began at 0 and 200
        with monkeypatch.context() as patch:
            at_call(patch, main.ReplayMemory, "push", row, kill)
            with pytest.raises(Killed):
                run_main(tmp_path / "killed", **ATARI)
    status, told = run_main(tmp_path / "killed", **ATARI)
    assert status == 0
    assert "going on at step 300 from models/checkpoint_0000000300" in told
    assert kill_test.results(tmp_path / "killed") == kill_test.results(alone(**ATARI))


def test_pictures_after_the_checkpoint_are_written_again(monkeypatch, run_main, alone, tmp_path):
    with monkeypatch.context() as patch:
        at_call(patch, main.ReplayMemory, "push", 49, kill)
        with pytest.raises(Killed):
            run_main(tmp_path / "killed", RENDER=True, MAX_STEPS=200, **ATARI)
    (tmp_path / "killed" / "eval_001").mkdir()  # written in part, with a longer game
    (tmp_path / "killed" / "eval_001" / "999999.png").touch()
    assert run_main(tmp_path / "killed", RENDER=True, MAX_STEPS=200, **ATARI)[0] == 0
    assert kill_test.results(tmp_path / "killed") == kill_test.results(alone(RENDER=True, MAX_STEPS=200, **ATARI))


def test_a_real_run_survives_sigkill(tmp_path):
    constants = {**kill_test.SMALL, "MAX_STEPS": 2_400, "EVAL_EPISODES": 1}  # which replays uniformly
    assert kill_test.kill_runs(tmp_path, 2, constants)["files"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("prioritized", [False, True])
def test_damage_to_the_checkpoint_of_a_run_is_noticed_or_harmless(monkeypatch, run_main, tmp_path, prioritized):
    with monkeypatch.context() as patch:
        at_call(patch, main.ReplayMemory, "push", 80, kill)
        with pytest.raises(Killed):
            run_main(tmp_path / "killed", PRIORITIZED=prioritized)
    path = tmp_path / "damaged" / "models" / "checkpoint_0000000300"
    content = (tmp_path / "killed" / "models" / path.name).read_bytes()
    resume = utils_run.Run.resume

    def take_up(damaged: bytes) -> tuple[int, bytes]:
        """The step at which the run goes on, and what it has learned and remembers then."""
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        shutil.copytree(tmp_path / "killed", tmp_path / "damaged")
        path.write_bytes(damaged)
        found = []

        def stop(run, agent, memory) -> int:
            step, state = resume(run, agent, memory), io.BytesIO()
            torch.save([agent.state_dict(), memory.state_dict()], state)
            found.append((step, state.getvalue()))
            raise Killed

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(utils_run.Run, "resume", stop)
            run_main(tmp_path / "damaged", PRIORITIZED=prioritized)
        return found[0]

    whole, before = take_up(content), take_up(b"")
    assert (whole[0], before[0]) == (300, 200)
    rng = random.Random(0)
    for _ in range(200):
        where = rng.randrange(len(content))
        flipped = content[:where] + bytes([content[where] ^ rng.randrange(1, 256)]) + content[where + 1 :]
        assert take_up(flipped) in (whole, before)
        assert take_up(content[:where]) == before


@pytest.mark.slow
def test_a_real_run_survives_signals(tmp_path):
    kill_test.stop_runs(tmp_path, 1, {**kill_test.SMALL, "MAX_STEPS": 2_000})


def test_a_tilde_in_save_prefix_is_the_home_directory(monkeypatch, run_main, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run_main(tmp_path / "run", SAVE_PREFIX="~/models", MAX_STEPS=8)[0] == 0
    assert (tmp_path / "home" / "models" / "model_000").exists()
    assert not (tmp_path / "run" / "~").exists()


def test_a_lost_terminal_ends_a_real_run_in_order_however_often_it_is_told(tmp_path):
    process = kill_test.start(tmp_path, {**kill_test.SMALL, "MAX_STEPS": 1_000_000, "CHECKPOINT_FREQ": 1_000_000})
    assert kill_test.wait_for(process, lambda: (tmp_path / "models" / "model_001").exists())
    process.stderr.close()  # nobody reads on
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert list((tmp_path / "models").glob("checkpoint_*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_iteration_and_the_run_goes_on_from_there(
    monkeypatch, run_main, tmp_path, number
):
    with monkeypatch.context() as patch:
        at_call(patch, main.ReplayMemory, "push", 30, lambda: os.kill(os.getpid(), number))
        status, told = run_main(tmp_path / "run")
    assert status == 128 + number
    assert told.splitlines()[-1] == f"stopped at step 120 by {number.name}; go on with: python main.py"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    status, told = run_main(tmp_path / "run")
    assert status == 0
    assert "going on at step 120 from models/checkpoint_0000000120" in told
    rows = (tmp_path / "run" / "rewards.txt").read_text().splitlines()
    assert [row.split()[:2] for row in rows] == [["0", "0"], ["1", "200"], ["2", "400"]]


@pytest.mark.parametrize(("evaluation", "steps"), [(0, 400), (1, 400), (2, 250)])  # the last one is off the beat
def test_a_signal_ends_an_evaluation_at_once_and_it_is_played_again(
    monkeypatch, run_main, alone, tmp_path, evaluation, steps
):
    stopped, constants = tmp_path / "stopped", {"CHECKPOINT_FREQ": 200, "MAX_STEPS": steps}

    def play_long() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    began = time.monotonic()
    with monkeypatch.context() as patch:
        at_call(patch, Corridor, "evaluate", evaluation + 1, play_long)
        assert run_main(stopped, **constants)[0] == 130
    assert time.monotonic() - began < 30
    assert run_main(stopped, **constants)[0] == 0
    assert kill_test.results(stopped) == kill_test.results(alone(**constants)), "evaluations are at checkpoints here"


def test_a_signal_before_the_first_step_leaves_no_checkpoint(monkeypatch, run_main, tmp_path):
    with monkeypatch.context() as patch:
        at_call(patch, Corridor, "evaluate", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        status, told = run_main(tmp_path / "run")
    assert status == 143
    assert told.splitlines()[-1] == "stopped before the first step by SIGTERM; start again with: python main.py"
    assert [path.name for path in (tmp_path / "run" / "models").iterdir()] == ["run.id"]


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory):
    """The directory of a run that was killed at step 232."""
    directory = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, main.ReplayMemory, "push", 60, kill)
        with pytest.raises(Killed):
            run_in(directory)
    return directory


@pytest.fixture
def killed(killed_once, tmp_path):
    """A copy of it, to go on with."""
    return shutil.copytree(killed_once, tmp_path / "killed")


@pytest.mark.parametrize(
    ("owner", "name"),
    [(main.Agent, "__init__"), (main.ReplayMemory, "load_state_dict")],
)
def test_a_signal_while_a_run_is_taken_up_again_ends_it_at_once(monkeypatch, run_main, alone, killed, owner, name):
    before = {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        status, told = run_main(killed)
    assert status == 143
    words = "stopped while starting, nothing is changed, by SIGTERM; start again with: python main.py"
    assert told.splitlines()[-1] == words
    assert {path: path.read_bytes() for path in killed.rglob("*") if path.is_file()} == before
    assert run_main(killed)[0] == 0
    assert kill_test.results(killed) == kill_test.results(alone())


@pytest.mark.parametrize("again", [False, True])
def test_a_signal_while_games_start_changes_nothing_that_the_run_has_learned(
    monkeypatch, run_main, alone, killed, again
):
    with monkeypatch.context() as patch:  # where the run is taken up again, and after its next checkpoint
        at_call(patch, main.ReplayMemory, "reseed", 1 + again, lambda: os.kill(os.getpid(), signal.SIGINT))
        status, told = run_main(killed)
    assert status == 130
    step = 300 if again else 200
    assert told.splitlines()[-1] == f"stopped at step {step} by SIGINT; go on with: python main.py"
    assert max(path.name for path in (killed / "models").glob("checkpoint_*")) == f"checkpoint_{step:010d}"
    assert run_main(killed)[0] == 0
    assert kill_test.results(killed) == kill_test.results(alone())


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [(utils_run.Run, "report", 1), (main.ReplayMemory, "push", 3)],
)
def test_a_start_that_came_to_nothing_makes_way_for_other_constants(
    monkeypatch, run_main, alone, tmp_path, owner, name, number
):
    begun = tmp_path / "begun"
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, number, kill)
        with pytest.raises(Killed):
            run_main(begun, RENDER=True, SAVE_PREFIX="other", **ATARI)
    status, told = run_main(begun, MAX_STEPS=8, **ATARI)
    assert status == 0
    assert "the run in this directory had SAVE_PREFIX=other, not " in told
    assert ", and no results: a new one takes its place" in told
    assert kill_test.results(begun) == kill_test.results(alone(MAX_STEPS=8, **ATARI))
    assert len(list((begun / "curves").iterdir())) == 1


def test_ctrl_c_while_the_program_is_loaded_ends_it_without_a_traceback(tmp_path):
    process = kill_test.start(tmp_path, kill_test.SMALL)
    assert kill_test.wait_for(process, lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(signal.SIGINT)
    assert (process.communicate()[1], process.returncode) == ("", -signal.SIGINT)


def test_a_signal_while_a_checkpoint_is_written_ends_the_run_with_that_one(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    agent, memory = Part(), Part()
    agent.state_dict = lambda: os.kill(os.getpid(), signal.SIGTERM) or {"numbers": agent.numbers}

    def run() -> None:
        with utils_run.open_run(constants(), CPU, ReplayMemory) as run:
            run.resume(agent, memory)
            run.step = 100
            assert run.checkpoint_due()
            run.save(None)

    with pytest.raises(utils_config.Stopped, match="stopped at step 100 by SIGTERM"):
        run()


def test_a_pipe_that_nobody_reads_any_more_ends_the_run_like_a_lost_terminal(tmp_path):
    process = kill_test.start(tmp_path, {**kill_test.SMALL, "MAX_STEPS": 1_000_000, "CHECKPOINT_FREQ": 1_000_000})
    assert kill_test.wait_for(process, lambda: (tmp_path / "models" / "model_001").exists())
    process.stderr.close()
    assert process.wait(60) == 128 + signal.SIGHUP
    (*_, checkpoint) = sorted((tmp_path / "models").glob("checkpoint_*"))
    step = json.loads((tmp_path / "run.json").read_text())["checkpoint"]
    assert checkpoint.name == f"checkpoint_{step:010d}"
    rows = step // kill_test.SMALL["NUM_ENVS"]  # the last row of each stretch is never stored, the first of each is
    assert torch.load(checkpoint, weights_only=True)["memory"]["pushed"] == rows, "between two iterations"


def test_a_terminal_that_goes_without_a_word_ends_the_run_in_order(tmp_path):
    mine, its = pty.openpty()
    arguments = [f"--{name}={value}" for name, value in kill_test.SMALL.items()]
    command = [sys.executable, str(kill_test.MAIN), *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=its, start_new_session=True)
    os.close(its)
    os.set_blocking(mine, False)
    told = []

    def read() -> bool:
        with contextlib.suppress(BlockingIOError):
            told.append(os.read(mine, 65536))
        return (tmp_path / "models" / "model_001").exists()

    assert kill_test.wait_for(process, read)
    os.close(mine)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert list((tmp_path / "models").glob("checkpoint_*"))


def test_under_nohup_a_run_goes_on_when_nobody_reads_any_more(tmp_path):
    ignore = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    process = kill_test.start(tmp_path, {**kill_test.SMALL, "MAX_STEPS": 2_000}, preexec_fn=ignore)
    assert kill_test.wait_for(process, lambda: (tmp_path / "models" / "model_000").exists())
    process.stderr.close()
    assert process.wait(60) == 0
    assert (tmp_path / "models" / "model_002").exists()


def test_ctrl_c_keeps_its_status_where_the_reader_of_the_pipe_went_first(tmp_path):
    process = kill_test.start(tmp_path, {**kill_test.SMALL, "MAX_STEPS": 1_000_000, "EVALUATE_FREQ": 1_000_000})
    assert kill_test.wait_for(process, lambda: (tmp_path / "models" / "checkpoint_0000000800").exists())
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT


def test_a_second_signal_leaves_at_once(tmp_path):
    script = (
        "import os, signal, sys, time, torch, main, utils_config\n"
        "def hang(*_):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "main.Agent.state_dict = hang\n"
        "sys.exit(utils_config.run(main.main, vars(main)))\n"
    )
    arguments = [f"--{name}={value}" for name, value in {**RUN, "MAX_STEPS": 10_000}.items()]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(main.__file__).parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT
    process.stdout.close()


def test_a_finished_run_names_its_best_model_and_touches_nothing(run_main, tmp_path):
    assert run_main(tmp_path / "run", MAX_STEPS=250)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    status, told = run_main(tmp_path / "run", MAX_STEPS=250)
    rows = [row.split() for row in (tmp_path / "run" / "rewards.txt").read_text().splitlines()]
    number, _, score = max(reversed(rows), key=lambda row: float(row[2]))
    ways = "a larger MAX_STEPS goes on with it, another run starts elsewhere"
    best = f"its best model has a mean score of {score}, watch it with: python main.py --PLAY=models/model_00{number}"
    assert (status, told) == (0, f"this run is finished, at step 252; {ways}; {best}\n")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_finished_run_goes_on_with_more_steps(run_main, alone, tmp_path):
    assert run_main(tmp_path / "longer", MAX_STEPS=200)[0] == 0
    status, told = run_main(tmp_path / "longer")
    assert (status, "going on at step 200 from models/checkpoint_0000000200" in told) == (0, True)
    assert kill_test.results(tmp_path / "longer") == kill_test.results(alone())
    record = json.loads((tmp_path / "longer" / "run.json").read_text())
    assert (record["finished"], record["constants"]["MAX_STEPS"]) == (400, 400)


def test_an_evaluation_at_an_end_off_the_beat_makes_way_when_the_run_goes_on(run_main, tmp_path):
    assert run_main(tmp_path / "run", MAX_STEPS=250)[0] == 0
    assert [row.split()[1] for row in (tmp_path / "run" / "rewards.txt").open()] == ["0", "200", "252"]
    status, told = run_main(tmp_path / "run")
    assert (status, "going on at step 252 from" in told) == (0, True)
    assert [row.split()[1] for row in (tmp_path / "run" / "rewards.txt").open()] == ["0", "200", "400"]
    assert torch.load(tmp_path / "run" / "models" / "model_002", weights_only=True)["about"]["step"] == 400


def test_at_most_two_checkpoints_are_kept_and_one_when_the_run_is_finished(run_main, tmp_path):
    kept = []

    def evaluate(env, *arguments, **options):
        kept.append(sorted(path.name for path in Path("models").glob("checkpoint*")))
        return np.zeros(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Corridor, "evaluate", evaluate)
        run_main(tmp_path / "run")
    assert kept == [[], ["checkpoint_0000000100"], ["checkpoint_0000000200", "checkpoint_0000000300"]]
    assert [path.name for path in (tmp_path / "run" / "models").glob("checkpoint*")] == ["checkpoint_0000000400"]


def test_a_run_that_is_killed_at_its_very_end_is_finished_by_the_next_start(monkeypatch, run_main, tmp_path):
    checkpoints, unlink = tmp_path / "run" / "models", Path.unlink

    def remove(path: Path, missing_ok: bool = False) -> None:
        if path.name == "checkpoint_0000000300":
            raise Killed
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", remove)
        with pytest.raises(Killed):
            run_main(tmp_path / "run")
    assert (checkpoints / "checkpoint_0000000300").exists()
    status, told = run_main(tmp_path / "run")
    assert (status, "finished after" in told) == (0, True)
    (last,) = checkpoints.glob("checkpoint*")
    assert last.name == "checkpoint_0000000400"
    last.write_bytes(b"")
    status, told = run_main(tmp_path / "run", MAX_STEPS=600)
    assert (status, "checkpoint_0000000400 is refused: it is damaged; rewards.txt and the models" in told) == (2, True)


# At the next checkpoint, or at the last step before a look.
@pytest.mark.parametrize(("looks", "step"), [(1_000, 300), (40, 236)])
def test_a_loss_that_is_no_number_ends_the_run_with_step_loss_and_remedy(monkeypatch, run_main, tmp_path, looks, step):
    learn, calls = main.Agent.learn, iter(range(1000))
    monkeypatch.setattr(utils_log, "SHOW_FREQ", looks)
    monkeypatch.setattr(main.Agent, "learn", lambda *a: learn(*a) * (math.nan if next(calls) > 30 else 1))
    status, told = run_main(tmp_path / "run")
    assert status == 1
    assert told.splitlines()[-1].startswith(f"error: step {step}: training has diverged, the loss is nan")
    assert "the last good checkpoint is models/checkpoint_0000000200; start elsewhere with a lower" in told
    assert len((tmp_path / "run" / "rewards.txt").read_text().splitlines()) == 2


def test_a_run_goes_on_without_curves_and_a_picture_that_cannot_be_written(monkeypatch, run_main, alone, tmp_path):
    def remove() -> None:
        shutil.rmtree("curves")
        Path("rewards.png").unlink()
        Path("rewards.png").mkdir()

    tracebacks = []
    with monkeypatch.context() as patch:
        patch.setattr(threading, "excepthook", tracebacks.append)
        at_call(patch, main.ReplayMemory, "push", 3, remove)
        status, told = run_main(tmp_path / "run")
        assert threading.excepthook == tracebacks.append
    assert (status, tracebacks) == (0, [])
    assert (
        told.count("cannot write curves: No such file or directory; going on without them until the next start\n") == 1
    )
    assert told.count("cannot write rewards.png: Is a directory; going on without it\n") == 2  # evaluations
    for file in ("rewards.txt", "models/model_002"):
        assert (tmp_path / "run" / file).read_bytes() == (alone() / file).read_bytes()


def test_a_run_goes_on_without_curves_that_cannot_be_begun(monkeypatch, run_main, alone, killed):
    shutil.rmtree(killed / "curves")
    (killed / "curves").touch()
    status, told = run_main(killed)
    assert status == 0
    assert told.count("cannot write curves: File exists; going on without them until the next start\n") == 1
    for file in ("rewards.txt", "models/model_002"):
        assert (killed / file).read_bytes() == (alone() / file).read_bytes()


@pytest.mark.parametrize("checkpoint_freq", [100, 1_000])  # a checkpoint comes first, or an evaluation
def test_weights_that_are_no_numbers_are_never_saved(monkeypatch, run_main, tmp_path, checkpoint_freq):
    learn, calls = main.Agent.learn, iter(range(1000))

    def diverge(agent, *args):
        if next(calls) == 30:
            next(agent.policy.parameters()).data[0] = math.inf
        return torch.zeros_like(learn(agent, *args))  # so that the loss does not tell

    monkeypatch.setattr(main.Agent, "learn", diverge)
    status, told = run_main(tmp_path / "run", CHECKPOINT_FREQ=checkpoint_freq)
    assert (status, "training has diverged, a weight is no finite number any more" in told) == (1, True)
    for path in (tmp_path / "run" / "models").glob("*_*"):
        saved = torch.load(path, weights_only=True)
        agent = saved.get("agent", {})
        weights = [*saved["weights"].values()] if not agent else [*agent["policy"].values(), agent["average"]]
        assert all(weight.isfinite().all() for weight in weights)


def test_the_record_tells_how_the_run_came_about(run_main, tmp_path):
    run_main(tmp_path / "run", MAX_STEPS=40)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["constants"] == {**{n: getattr(main, n) for n in record["constants"]}, **RUN, "MAX_STEPS": 40}
    assert record["constants"].keys() == utils_config.types(vars(main)).keys()
    (start,) = record["starts"]
    assert start["command"] == "python main.py"
    assert start["torch"] == torch.__version__
    assert start["device"].startswith("cpu (")
    assert start["cpu"] in Path("/proc/cpuinfo").read_text()
    assert {"python", "numpy", "gymnasium", "ale-py", "commit", "dirty", "precision", "time"} <= start.keys()


def test_other_threads_or_devices_may_go_on_but_are_said_not_to_be_bit_for_bit(monkeypatch, run_main, tmp_path):
    with monkeypatch.context() as patch:
        at_call(patch, main.ReplayMemory, "push", 32, lambda: os.kill(os.getpid(), signal.SIGINT))
        run_main(tmp_path / "run")
    try:
        status, told = run_main(tmp_path / "run", THREADS=2, DEVICE="cpu:0")
    finally:
        torch.set_num_threads(1)
    assert status == 0
    assert re.search("not bit for bit as before: device was cpu .*, 1 thread, is cpu:0 .*, 2 threads\n", told)


# Files and faults, with something small in place of agent and memory


class Part:
    """Stands in for an agent and for a memory: a few numbers that change."""

    def __init__(self, size: int = 1000):
        self.numbers = torch.zeros(size)

    def is_finite(self) -> bool:
        """Whether they are numbers."""
        return bool(self.numbers.isfinite().all())

    def state_dict(self) -> dict:
        """The numbers."""
        return {"numbers": self.numbers}

    def load_state_dict(self, state: dict) -> None:
        """The numbers."""
        if state["numbers"].shape != self.numbers.shape:
            raise ValueError("another size")
        self.numbers.copy_(state["numbers"])


def constants(**values) -> dict:
    """Those of main.py, but for some."""
    return {**utils_config.check(vars(main)), **RUN, "EVALUATE_FREQ": 100, **values}


def write(last: int, size: int = 1000, **values) -> None:
    """A run here that has come to step `last` and dies."""
    try:
        with utils_run.open_run(constants(**values), CPU, ReplayMemory) as run:
            part = Part(size)
            start = run.resume(part, part)
            if not run.is_evaluated:
                run.report(np.array([start, start + 1]))
            for step in range(start + 4, last + 4, 4):
                part.numbers.fill_(step)
                run.step = step
                if step % 100 == 0:
                    run.report(np.array([step, step + 1]))
                if run.checkpoint_due():
                    run.save(None)
            raise Killed
    except Killed:
        pass


def resume(**values) -> int:
    """The step at which the run here goes on; the numbers must be those of that step."""
    part = Part()
    try:
        with utils_run.open_run(constants(**values), CPU, ReplayMemory) as run:
            step = run.resume(part, part)
            raise Killed
    except Killed:
        assert (part.numbers == step).all()
        rows = Path("rewards.txt").read_text().splitlines()
        assert [int(row.split()[1]) for row in rows] == list(range(0, step + 1, 100))
        return step


@pytest.fixture
def place(monkeypatch, tmp_path):
    """An empty directory to run in, and one with a run of checkpoints at 200 and 300 to copy from."""
    source = tmp_path / "source"
    source.mkdir()
    monkeypatch.chdir(source)
    write(340)
    monkeypatch.chdir(tmp_path)

    def fresh() -> Path:
        os.chdir(tmp_path)
        shutil.rmtree("copy", ignore_errors=True)
        shutil.copytree("source", "copy")
        os.chdir("copy")
        return Path("models/checkpoint_0000000300")

    return fresh


def test_going_on_takes_back_the_runs_own_pictures_and_nothing_else(place):
    place()
    mine = ["eval_004/000000.png", "eval_004.gif", "eval_1000/000000.png", "eval_1000.gif"]
    others = [
        "eval_2024/notes.txt",
        "eval_2025",
        "eval_0012.gif",
        "eval_005/events.csv",
        "eval_006/1.png",
        "eval_7.csv",
    ]
    others += ["eval_007.txt", "eval_7/000000.png", "eval_001/000000.png", "eval_x"]
    for name in (*mine, *others):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert resume() == 300
    assert not any(Path(name).exists() for name in (*mine, "eval_004", "eval_1000"))
    assert [name for name in others if Path(name).exists()] == others


def test_a_run_goes_on_from_its_newest_checkpoint(place):
    place()
    assert resume() == 300


def test_checkpoints_cut_short_give_way_to_the_one_before(place, capsys):
    rng = random.Random(0)
    content = place().read_bytes()
    for length in [0, 1, len(content) - 1, *(rng.randrange(len(content)) for _ in range(100))]:
        path = place()
        path.write_bytes(content[:length])
        assert resume() == 200
        assert f"{path} is refused: it is damaged; going on from the one before" in capsys.readouterr().err
        assert Path(f"{path}.refused").read_bytes() == content[:length]


def test_a_flipped_byte_is_noticed_or_harmless(place, capsys):
    rng = random.Random(0)
    content = place().read_bytes()
    steps = []
    for _ in range(100):
        path, where = place(), rng.randrange(len(content))
        path.write_bytes(content[:where] + bytes([content[where] ^ rng.randrange(1, 256)]) + content[where + 1 :])
        steps.append(resume())
        assert (steps[-1] == 300) != ("is refused" in capsys.readouterr().err)
    assert set(steps) == {200, 300}, "padding may change, data may not"


def test_going_on_removes_a_checkpoint_that_was_being_written_and_counts_its_room_as_free(monkeypatch, place):
    path = place()
    half = path.with_name("checkpoint_0000000400.tmp")
    with half.open("wb") as file:
        file.truncate(10**8)
    sizes = sum(each.stat().st_size for each in path.parent.glob("checkpoint_*"))
    needed = utils_machine.check_disk(constants(), path.parent, ReplayMemory)
    size = float(re.search(r"up to ([\d.]+) GB each", needed)[1]) * 1e9 + 5e6  # rounded
    disk = shutil._ntuple_diskusage(1e12, 1e12, int(3 * size - sizes))
    monkeypatch.setattr(utils_machine.shutil, "disk_usage", lambda _: disk)
    assert resume() == 300
    assert not half.exists()
    with pytest.raises(utils_config.ConfigError, match="free on the disk"):
        resume()  # which has less to make way now


def test_the_minutes_of_a_run_go_on_where_it_goes_on(place):
    place()
    with contextlib.suppress(Killed), utils_run.open_run(constants(), CPU, ReplayMemory) as run:
        part = Part()
        run.resume(part, part)
        run._began -= 3600
        run.step = 320
        run.save(None)
        raise Killed
    with contextlib.suppress(Killed), utils_run.open_run(constants(), CPU, ReplayMemory) as run:
        run.resume(part, part)
        run.step = 400
        run.report(np.array([1.0]))
        assert 60 <= run.evaluations[-1].minutes < 65
        raise Killed


def test_a_missing_checkpoint_gives_way_aloud_to_the_one_before(place, capsys):
    path = place()
    path.unlink()
    assert resume() == 200
    assert f"{path} is missing; going on from the one before" in capsys.readouterr().err


def test_without_a_good_checkpoint_the_run_is_refused_and_nothing_is_touched(place):
    path = place()
    before = Path("models/checkpoint_0000000200")
    path.write_bytes(b"")
    before.write_bytes(b"PK")
    content = {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file()}
    sentence = f"{path} is refused: it is damaged; {before} is refused: it is damaged; rewards.txt and the models are"
    with pytest.raises(utils_config.ConfigError, match=re.escape(sentence)):
        resume()
    assert {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file()} == content
    path.unlink()
    before.unlink()
    with pytest.raises(utils_config.ConfigError, match=f"{path} is missing; .*; put a good copy"):
        resume()


def test_a_checkpoint_that_gave_way_is_written_again_where_the_run_is_stopped(place):
    place().write_bytes(b"")
    part = Part()

    def run() -> None:
        with utils_run.open_run(constants(), CPU, ReplayMemory) as run:
            run.resume(part, part)
            part.numbers.fill_(300)
            run.step = 300
            run.report(np.array([1.0]))
            with run.interruptible():
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(utils_config.Stopped, match="stopped at step 300 by SIGINT"):
        run()
    assert resume() == 300


def test_checkpoints_that_changed_places_are_refused(place):
    path = place()
    before = Path("models/checkpoint_0000000200")
    path.rename("x")
    before.rename(path)
    Path("x").rename(before)
    with pytest.raises(utils_config.ConfigError, match="it was written as checkpoint_0000000200"):
        resume()


def test_a_checkpoint_of_another_run_is_refused(place, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    os.chdir(other)
    write(340)
    path = place()
    shutil.copy(other / path, path)
    assert resume() == 200
    assert "is refused: it is of another run" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("GAME", "pong"), ("LEARNING_RATE", 0.5), ("BETA_STEPS", 1000)])
def test_other_constants_are_refused(place, name, value):
    place()
    with pytest.raises(utils_config.ConfigError, match=f"the run in this directory has {name}="):
        resume(**{name: value})
    assert resume() == 300


def test_other_spellings_of_the_same_constants_go_on(place):
    place()
    assert resume(GAME="ALE/Breakout-v5") == 300
    os.symlink("models", "link")
    for name in ("models/", os.path.abspath("models"), "link", "./models"):
        assert resume(SAVE_PREFIX=name) == 300
    with pytest.raises(utils_config.ConfigError, match=r"has SAVE_PREFIX=\./models, not others"):
        resume(SAVE_PREFIX="others")
    with pytest.raises(utils_config.ConfigError, match="has GAME=breakout, not pong"):
        resume(GAME="pong")


def test_a_game_that_is_no_longer_shipped_is_another_one(place, monkeypatch):
    def unknown(name: str) -> str:
        raise ValueError

    place()
    monkeypatch.setattr(utils_record, "normalize_game", unknown)
    with pytest.raises(utils_config.ConfigError, match="has GAME=breakout, not pong"):
        resume(GAME="pong")


def test_an_end_behind_the_checkpoint_is_refused_and_a_later_one_is_not(place):
    place()
    with pytest.raises(utils_config.ConfigError, match=r"MAX_STEPS \(200\) is behind this run, whose .* step 300"):
        resume(MAX_STEPS=200)
    assert resume(MAX_STEPS=300) == resume(MAX_STEPS=10_000) == 300


def test_an_end_behind_a_checkpoint_of_which_the_record_does_not_know_yet_is_refused(place):
    path = place()
    newest = path.with_name("checkpoint_0000000400")
    path.rename(newest)
    with pytest.raises(utils_config.ConfigError, match=r"MAX_STEPS \(350\) is behind this run, whose .* step 400"):
        resume(MAX_STEPS=350)
    assert newest.exists()


def test_constants_that_come_and_go_are_told(place, monkeypatch):
    place()
    commit = json.loads(Path("run.json").read_text())["starts"][-1]["commit"]
    told = f" (commit {commit})" if commit else ""
    with monkeypatch.context() as patch:
        patch.setitem(main.__annotations__, "EXTRA", int)
        patch.setattr(main, "EXTRA", 3, raising=False)
        sentence = f"has no EXTRA, not 3; go on with the version of this program that it ran with{told}, or "
        with pytest.raises(utils_config.ConfigError, match=re.escape(sentence)):
            resume()
    changed = utils_record.changed({"OLD": 3, "SEED": 1}, {"SEED": 1})
    assert changed == "OLD=3, which main.py has no more"


def test_a_checkpoint_with_other_constants_under_the_same_record_is_refused(place, capsys):
    path = place()
    state = torch.load(path, weights_only=True)
    torch.save({**state, "constants": {**state["constants"], "GAMMA": 0.5}}, path)
    assert resume() == 200
    assert "it is of a run with GAMMA=0.5, not 0.99" in capsys.readouterr().err


class Evil:
    """A pickle that runs code."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_pickle_that_would_run_code_does_not(place):
    path = place()
    state = torch.load(path, weights_only=True)
    whole = io.BytesIO()
    torch.save({**state, "agent": Evil()}, whole)
    for content in (pickle.dumps(Evil()), whole.getvalue()):
        place().write_bytes(content)
        assert resume() == 200
        assert not Path("evil").exists()


def parsed(content: bytes) -> object:
    """The JSON in `content`, None for what is none."""
    with contextlib.suppress(ValueError):
        return json.loads(content)


def test_a_damaged_record_is_refused(place):
    rng = random.Random(0)
    place()
    content = Path("run.json").read_bytes()
    for _ in range(200):
        where = rng.randrange(len(content))
        for damaged in (content[:where], content[:where] + bytes([rng.randrange(256)]) + content[where + 1 :]):
            place()
            Path("run.json").write_bytes(damaged)
            if parsed(damaged) == parsed(content):  # white space
                assert resume() == 300
            else:
                with pytest.raises(utils_config.ConfigError, match=r"run\.json is damaged"):
                    resume()
    for foreign in (b"null", b"[]", b"{}", b'{"crc32": 0}', b"[" * 100_000, content.replace(b'"run"', b'"x"')):
        place()
        Path("run.json").write_bytes(foreign)
        with pytest.raises(utils_config.ConfigError, match=r"run\.json is damaged"):
            resume()


def test_a_second_start_beside_a_running_one_is_refused(monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def begin_again() -> None:
        for directory, models in (("elsewhere", "../models"), (".", "models"), (".", "other_models")):
            monkeypatch.chdir(tmp_path / directory)
            with pytest.raises(utils_config.ConfigError, match="another run is at work"):
                write(20, SAVE_PREFIX=models)

    with utils_run.open_run(constants(), CPU, ReplayMemory) as run:
        begin_again()  # while the first has nothing yet but an empty directory
        run.resume(Part(), Part())
        run.report(np.array([1.0]))
        begin_again()
        assert not Path("other_models").exists()
    write(20)  # the lock is gone


def test_an_empty_directory_of_the_users_outlives_a_start_that_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("rewards.txt").touch()
    with pytest.raises(utils_config.ConfigError, match=r"rewards\.txt is from another run"):
        write(20)
    assert Path("models").is_dir()
    Path("models").rmdir()
    with pytest.raises(utils_config.ConfigError, match=r"rewards\.txt is from another run"):
        write(20)
    assert not Path("models").exists()


@pytest.mark.parametrize(
    ("every", "steps", "last"),
    [
        (100, 350, 4),
        (100, 400, 4),
        (100, 397, 4),
        (100, 301, 4),
        (100, 300, 3),
        (150, 450, 3),
        (150, 451, 3),
        (150, 453, 4),
    ],
)
def test_models_of_a_run_that_becomes_shorter_than_it_was_are_gone(monkeypatch, tmp_path, every, steps, last):
    """With 4 games in step: the iteration that ends at 452 passes 450 and 451, and one evaluation follows it."""
    monkeypatch.chdir(tmp_path)
    write(200, MAX_STEPS=1_000, CHECKPOINT_FREQ=200, EVALUATE_FREQ=every)
    for number in range(10):
        Path(f"models/model_{number:03d}").touch()
    Path("models/model_best").touch()
    part = Part()
    shorter = constants(MAX_STEPS=steps, CHECKPOINT_FREQ=200, EVALUATE_FREQ=every)
    with contextlib.suppress(Killed), utils_run.open_run(shorter, CPU, ReplayMemory) as run:
        run.resume(part, part)
        raise Killed
    names = [*(f"model_{number:03d}" for number in range(last + 1)), "model_best"]
    assert sorted(path.name for path in Path("models").glob("model_*")) == names


def test_a_disk_without_room_for_the_checkpoints_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(utils_machine.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e9, 7e9, 2e9))
    with (
        pytest.raises(utils_config.ConfigError, match=r"up to 0\.74 GB each, .*, 2\.00 GB free on .*MEM_SIZE=80_000"),
        utils_run.open_run(constants(MEM_SIZE=100_000, MAX_STEPS=1_000_000), CPU, ReplayMemory),
    ):
        pass
    for sizes in ({"MEM_SIZE": 70_000, "MAX_STEPS": 1_000_000}, {"MEM_SIZE": 1_000_000, "MAX_STEPS": 70_000}):
        with pytest.raises(Killed), utils_run.open_run(constants(**sizes), CPU, ReplayMemory):
            raise Killed  # 0.6 GB three times are there, and of a large memory a short run fills no more


@pytest.mark.parametrize("place", ["disk", "RAM"])
def test_without_room_for_its_successor_a_run_that_has_learned_nothing_is_kept(monkeypatch, run_main, tmp_path, place):
    with monkeypatch.context() as patch:
        at_call(patch, main.ReplayMemory, "push", 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert run_main(tmp_path)[0] == 130
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if place == "disk":
        monkeypatch.setattr(utils_machine.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e9, 9e9, 1e6))
    else:
        monkeypatch.setattr(utils_machine, "free_bytes", lambda _: 0)
    status, told = run_main(tmp_path, LEARNING_RATE=2e-3)
    assert status == 2
    assert "free some, or" in told
    assert "takes its place" not in told
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.fixture
def begun(monkeypatch, tmp_path):
    """A run in the current directory that was evaluated at step 0, stopped twice in its warm-up, and killed."""
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(Killed), utils_run.open_run(constants(), CPU, ReplayMemory) as run:
        run.resume(Part(), Part())
        run.report(np.array([1.0]))
        for name in ("models/model_000", "rewards.png", "eval_000/000000.png", "eval_000.gif", "curves/events.out.x"):
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).touch()
        for name in ("checkpoint_0000000200.tmp", "checkpoint_0000000060", "checkpoint_0000000100"):
            Path("models", name).touch()
        raise Killed


def files() -> dict[Path, bytes]:
    """Those here, and what is in them."""
    return {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file()}


@pytest.mark.parametrize("number", range(1, 12))
@pytest.mark.usefixtures("begun")
def test_removing_a_run_without_results_may_be_cut_short(monkeypatch, number):
    with monkeypatch.context() as patch:
        at_call(patch, Path, "unlink", number, kill)
        with pytest.raises(Killed), utils_run.open_run(constants(GAMMA=0.5), CPU, ReplayMemory) as run:
            run.resume(Part(), Part())
    assert Path("run.json").exists()
    write(20, GAMMA=0.5)
    assert sorted(str(path) for path in files()) == ["models/run.id", "rewards.txt", "run.json"]


def test_files_with_names_like_those_of_a_run_are_in_no_ones_way(monkeypatch, run_main, tmp_path):
    names = ["eval_model.py", "eval_x.tmp", "model_best.pt", "checkpoint_notes.txt", "eval_0012.gif"]
    for name in names:
        (tmp_path / name).write_text("mine")
    with monkeypatch.context() as patch:
        at_call(patch, main.ReplayMemory, "push", 3, kill)
        with pytest.raises(Killed):
            run_main(tmp_path, SAVE_PREFIX=".", MAX_STEPS=12)
    status, told = run_main(tmp_path, SAVE_PREFIX=".", MAX_STEPS=12, SEED=5)
    assert (status, "a new one takes its place" in told) == (0, True)
    assert [(tmp_path / name).read_text() for name in names] == ["mine"] * len(names)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_directory_that_cannot_be_synced_is_no_error_and_one_that_fails_is(monkeypatch, tmp_path, number):
    sync, file, synced = os.fsync, tmp_path / "file", []

    def fsync(handle: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(handle).st_mode), file.exists()))
        if synced[-1][0]:
            raise OSError(number, os.strerror(number))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    opened = len(os.listdir("/proc/self/fd"))
    with contextlib.nullcontext() if number == errno.EINVAL else pytest.raises(OSError, match=f"error: '{file}'"):
        utils_files.write_whole(file, lambda file: file.write(b"all of it"))
    assert file.read_bytes() == b"all of it"
    assert len(os.listdir("/proc/self/fd")) == opened
    assert synced == [(False, False), (True, True)], "the content before its name"


@pytest.mark.parametrize("elsewhere", [{}, {"SAVE_PREFIX": "other"}])
@pytest.mark.usefixtures("begun")
def test_a_run_that_is_to_make_way_stays_until_the_new_one_begins(elsewhere):
    before, new = files(), constants(GAMMA=0.5, **elsewhere)
    told = "stopped while starting, nothing is changed, by SIGTERM"
    with pytest.raises(utils_config.Stopped, match=told), utils_run.open_run(new, CPU, ReplayMemory):
        os.kill(os.getpid(), signal.SIGTERM)
    assert files() == before
    with pytest.raises(Killed), utils_run.open_run(new, CPU, ReplayMemory):
        raise Killed
    assert files() == before
    with contextlib.suppress(Killed), utils_run.open_run(new, CPU, ReplayMemory) as run:
        assert run.resume(Part(), Part()) == 0
        raise Killed
    models = elsewhere.get("SAVE_PREFIX", "models")
    assert sorted(map(str, files())) == sorted([f"{models}/run.id", "run.json"])


@pytest.mark.parametrize("number", [1, 6, 11])
@pytest.mark.usefixtures("begun")
def test_a_signal_while_a_run_is_removed_waits_for_the_new_one(monkeypatch, number):
    def begin() -> None:
        with utils_run.open_run(constants(GAMMA=0.5), CPU, ReplayMemory) as run:
            run.resume(Part(), Part())
            with run.interruptible():
                pass

    at_call(monkeypatch, Path, "unlink", number, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(utils_config.Stopped, match="stopped before the first step by SIGTERM"):
        begin()
    assert sorted(map(str, files())) == ["models/run.id", "run.json"]


@pytest.mark.usefixtures("begun")
def test_the_models_of_a_run_that_makes_way_are_locked_while_they_are_removed_and_no_longer():
    def lock() -> int:
        handle = os.open("models", os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle

    before, new = files(), constants(SAVE_PREFIX="other")
    other = lock()  # as of another run
    with (
        pytest.raises(utils_config.ConfigError, match=r"another run is at work in .*/models"),
        utils_run.open_run(new, CPU, ReplayMemory) as run,
    ):
        run.resume(Part(), Part())
    assert files() == before
    os.close(other)
    with contextlib.suppress(Killed), utils_run.open_run(new, CPU, ReplayMemory) as run:
        run.resume(Part(), Part())
        os.close(lock())
        raise Killed


@pytest.mark.usefixtures("begun")
def test_a_run_makes_no_way_for_one_whose_models_would_lie_among_anothers():
    Path("other").mkdir()
    Path("other/model_000").touch()
    before = files()
    with pytest.raises(utils_config.ConfigError, match="other/model_000 is from another run"):
        write(20, SAVE_PREFIX="other")
    assert files() == before


@pytest.mark.parametrize("more", ["models/model_001", "models/checkpoint_0000000200", "eval_001.gif", "rewards.txt"])
@pytest.mark.usefixtures("begun")
def test_a_run_with_results_makes_no_way(monkeypatch, more):
    with open(more, "a") as file:
        file.write("  1      200 1.0\n")
    before = files()
    told = (
        r"has SEED=0, not 1, and GAMMA=0\.99, not 0\.5; give it the same \(it was last started with: python .*\), or "
    )
    monkeypatch.setattr(sys, "argv", ["main.py", "--SEED=1", "--GAMMA=0.5"])
    with pytest.raises(utils_config.ConfigError, match=told):
        write(20, GAMMA=0.5, SEED=1)
    assert files() == before


def test_models_of_another_run_in_a_shared_place_are_neither_overwritten_nor_removed(monkeypatch, tmp_path):
    mine, others = tmp_path / "mine", tmp_path / "others"
    for place in (mine, others):
        place.mkdir()
    monkeypatch.chdir(mine)
    write(40, SAVE_PREFIX="../shared")
    monkeypatch.chdir(others)
    write(40, SAVE_PREFIX="../shared")
    Path("../shared/model_000").write_text("precious")
    monkeypatch.chdir(mine)
    with pytest.raises(utils_config.ConfigError, match=r"\.\./shared/model_000 is from another run; start in another"):
        write(40, SAVE_PREFIX="../shared")
    with pytest.raises(utils_config.ConfigError, match=r"\.\./shared/model_000 is from another run"):
        write(40, SAVE_PREFIX="../shared", GAMMA=0.5)
    monkeypatch.chdir(others)
    write(40, SAVE_PREFIX="../shared")
    Path("../shared/run.id").write_bytes(b"\xff")
    with pytest.raises(utils_config.ConfigError, match=r"\.\./shared/model_000 is from another run"):
        write(40, SAVE_PREFIX="../shared")
    assert Path("../shared/model_000").read_text() == "precious"


@pytest.mark.usefixtures("begun")
def test_nothing_that_a_run_did_not_write_is_removed_with_it():
    Path("curves/mine").touch()
    with pytest.raises(utils_config.ConfigError, match="cannot remove curves: Directory not empty; mend that and"):
        write(20, GAMMA=0.5)
    Path("curves/mine").unlink()  # fails if it is not there
    write(20, GAMMA=0.5)


@pytest.fixture
def failing(place):
    """A function that does something in a run at step 300 and returns the sentence with which that ended it."""

    def fail(action, size: int = 1000) -> str:
        place()
        part = Part(size)

        def run() -> None:
            with utils_run.open_run(constants(), CPU, ReplayMemory) as run:
                run.resume(part, part)
                action(run, part)

        with pytest.raises(utils_config.Stopped) as stop:
            run()
        assert stop.value.status == 1
        assert len(str(stop.value).splitlines()) == 1
        assert not list(Path(".").rglob("*.tmp"))
        return str(stop.value)

    return fail


def test_a_full_disk_costs_no_earlier_checkpoint(failing):
    def fill(run, part) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        part.numbers = torch.zeros(1_000_000)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
            os.kill(os.getpid(), signal.SIGTERM)
            run.step = 399
            if run.checkpoint_due():
                run.save(None)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    told = failing(fill)
    assert "cannot write models/checkpoint_0000000" in told
    assert "File too large" in told
    assert "the last good checkpoint is models/checkpoint_0000000300; mend that and give the same command" in told
    assert resume() == 300


def test_an_allocation_that_python_refuses_is_told(failing):
    assert "step 300: out of memory: an allocation was refused; " in failing(lambda run, part: bytes(1 << 60))


def test_a_checkpoint_that_is_sound_but_lacks_something_is_told_from_a_damaged_one(place, capsys):
    path = place()
    state = torch.load(path, weights_only=True)
    del state["memory"]["numbers"]
    torch.save(state, path)
    assert resume() == 200
    assert f"{path} is refused: it cannot be taken up (KeyError: 'numbers'); going on from" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_checkpoint_that_cannot_be_read_now_stays_where_it_is(monkeypatch, place, number):
    path = place()

    def refuse(_) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(utils_files.zipfile, "ZipFile", refuse)
        with pytest.raises(
            utils_config.ConfigError, match=f"cannot read {path}: {os.strerror(number)}; mend that, or move"
        ):
            resume()
    assert resume() == 300


def test_a_directory_removed_under_a_run_is_told(failing):
    def remove(run, part) -> None:
        shutil.rmtree("models")
        run.step = 399
        run.report(np.array([1.0]))
        os.kill(os.getpid(), signal.SIGTERM)
        if run.checkpoint_due():
            run.save(None)

    assert "step 399: cannot write models/checkpoint_0000000399: No such file" in failing(remove)


def test_a_rewards_file_that_cannot_be_written_is_told(failing):
    def block(run, part) -> None:
        Path("rewards.txt").unlink()
        Path("rewards.txt").mkdir()
        run.report(np.array([1.0]))

    assert "cannot write rewards.txt: Is a directory; rewards.txt and the models are kept" in failing(block)


def test_an_allocation_that_is_refused_is_told(failing):
    assert "step 300: out of memory: " in failing(lambda run, part: torch.empty(1 << 50))
    assert resume() == 300


def test_memory_refused_while_a_checkpoint_is_read_leaves_it_where_it_is(monkeypatch, tmp_path):
    size = 10_000_000  # 40 MB
    monkeypatch.chdir(tmp_path)
    write(220, size)
    part, before = Part(size), files()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])

    def run() -> None:
        with utils_run.open_run(constants(), CPU, ReplayMemory) as run:
            resource.setrlimit(resource.RLIMIT_AS, (used + 10_000_000, limits[1]))
            run.resume(part, part)

    try:
        with pytest.raises(utils_config.Stopped, match=r"step 0: out of memory: .*checkpoint_0000000200; free some"):
            run()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert files() == before


def test_memory_refused_outside_of_a_run_is_told_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main.py"])
    assert utils_config.run(lambda: bytes(1 << 60), vars(main)) == 1
    assert capsys.readouterr().err == "error: out of memory: an allocation was refused; free some and try again\n"
    with pytest.raises(ZeroDivisionError):
        utils_config.run(lambda: 1 / 0, vars(main))


def test_an_error_that_is_none_of_these_keeps_its_traceback(place):
    place()
    with pytest.raises(RuntimeError, match="a fault"), utils_run.open_run(constants(), CPU, ReplayMemory):
        raise RuntimeError("a fault")


def test_a_checkpoint_is_a_zip_that_torch_loads_plainly(place):
    path = place()
    assert zipfile.is_zipfile(path)
    assert torch.load(path, weights_only=True)["step"] == 300
