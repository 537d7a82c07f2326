"""A run on disk: its record and lock, its checkpoints, and what ends it: signals, diverged training, full disks.

A checkpoint holds all that training has learned and remembers, but no random states and no emulators: after it, games
and random numbers start anew from (SEED, step), in the run that goes on as in the run that comes back. So a run that
is killed and started again with the same command does, on a CPU, bit for bit what it would have done.
"""

import contextlib
import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils_config import ConfigError, Stopped, check_disk, command_line, constants, describe_start, out_of_memory
from utils_drl import write_whole

RECORD, REWARDS, PICTURE, CURVES = Path("run.json"), Path("rewards.txt"), Path("rewards.png"), Path("curves")
FREE = ("THREADS", "RENDER")  # constants that may change when a run goes on; the first changes rounding
UNTRAINED = (REWARDS.name, PICTURE.name, CURVES.name, "model_000", "eval_000", "eval_000.gif")
ELSEWHERE = f"start in another directory, or move {RECORD}, rewards.*, {CURVES}, eval_* and what is in SAVE_PREFIX away"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last when the terminal goes, unless under nohup


@contextlib.contextmanager
def open_run(module: dict, device: torch.device, memory_bytes: int) -> Iterator["Run"]:
    """The run of the constants in `module`, new or gone on with, in the current directory and in SAVE_PREFIX.

    Raises ConfigError where its results cannot go or would mix with others, and Stopped for a run that has finished,
    or stops inside for a reason that a sentence can tell.
    """
    values = {name: module[name] for name in constants(module)}
    models = _models(values)
    with contextlib.ExitStack() as stack:
        try:
            _lock(Path("."), stack)
            record = _read_record(values)
            models.mkdir(parents=True, exist_ok=True)
            if not models.samefile("."):
                _lock(models, stack)
            record = record or _new_record(values, models)
            for place in (models, "."):
                tempfile.TemporaryFile(dir=place).close()
            space = check_disk(values, models, memory_bytes)
        except OSError as error:
            raise ConfigError(f"cannot write to {error.filename}: {error.strerror} (SAVE_PREFIX {models})") from None
        run = Run(record, values, models, device, space)
        for number in SIGNALS:
            stack.callback(signal.signal, number, signal.getsignal(number))
        show = threading.excepthook
        stack.callback(setattr, threading, "excepthook", show)  # the curves' thread hands its OSError on to the run
        threading.excepthook = lambda failed: None if isinstance(failed.exc_value, OSError) else show(failed)
        try:
            try:
                yield run
            except BrokenPipeError:  # who read what is said is gone, as a terminal may be
                run.hang_up()
            run.finish()
        except OSError as error:
            cause = f"cannot write {os.fsdecode(error.filename or 'results')}: {error.strerror}"
            raise run.stopped(cause, "mend that and give the same command again") from error
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            cause = f"out of memory: {str(error).splitlines()[0]}"
            raise run.stopped(cause, "free some and give the same command again") from error


class Evaluation(NamedTuple):
    """What an evaluation found."""

    number: int
    step: int
    minutes: float  # that the run had worked for
    scores: list[float]  # of its games

    @property
    def mean(self) -> float:
        """The mean score."""
        return float(np.mean(self.scores))

    @property
    def row(self) -> str:
        """The line of rewards.txt."""
        return f"{self.number:3d} {self.step:8d} {self.mean:.1f}\n"


class Run:
    """One run, from its first start to its end; made by `open_run`."""

    def __init__(self, record: dict, values: dict, models: Path, device: torch.device, space: str):
        self.models, self.space = models, space  # where its models go, and what its checkpoints take in words
        self._record, self._constants, self._device = record, values, device
        self.evaluations: list[Evaluation] = []
        self._began = time.monotonic()  # less what the run had worked for before
        self._step = 0  # of the state that a checkpoint would hold now
        self._signal = 0
        self._abort = False  # whether a signal may end what is going on

    def resume(self, agent, memory) -> int:
        """Bring both, and rewards.txt, to the newest good checkpoint; return its step, or 0 if there never was one.

        Raises ConfigError if none is good any more. From here on a signal ends the run in an orderly way.
        """
        self._agent, self._memory = agent, memory
        refused, good = {}, None
        for path in reversed(self._checkpoints()):
            try:
                self._load(path)
                good = path
                break
            except Exception as error:  # a damaged file raises any of a dozen kinds
                if out_of_memory(error):
                    raise
                refused[path] = str(error) if isinstance(error, ConfigError) else "it is damaged"
        self._beats = self._step // self._constants["CHECKPOINT_FREQ"]
        self._announce(good, refused)
        self._record["checkpoint"] = self._step if good else None
        self._clean()
        start = {"step": self._step, **describe_start(self._device, self._constants)}
        for last in self._record["starts"][-1:]:
            if changed := [key for key in start.keys() - {"step", "time", "command"} if start[key] != last.get(key)]:
                print(f"not bit for bit as before: this start differs in {', '.join(changed)}", file=sys.stderr)
        self._record["starts"].append(start)
        self._write_record()
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        return self._step

    def evaluated(self, step: int) -> bool:
        """Whether rewards.txt has a row for `step`."""
        return bool(self.evaluations) and self.evaluations[-1].step == step

    @contextlib.contextmanager
    def evaluation(self, step: int, loss: Tensor | None) -> Iterator[None]:
        """A part of the run, after `step`, that changes nothing in training: a signal ends it early."""
        self.check(step, loss, weights=True)
        self._step = step
        try:
            self._abort = True
            if self._signal:
                raise KeyboardInterrupt
            yield
            self._abort = False
        except KeyboardInterrupt:
            self._leave()

    def report(self, number: int, step: int, scores: np.ndarray) -> None:
        """Append a row to rewards.txt, with the mean of the games' `scores`."""
        evaluation = Evaluation(number, step, self._minutes(), scores.tolist())
        with open(REWARDS, "a") as file:
            file.write(evaluation.row)
            file.flush()
            os.fsync(file.fileno())
        self.evaluations.append(evaluation)

    def check(self, step: int, loss: Tensor | None, weights: bool = False) -> None:
        """Raise Stopped if `loss`, or with `weights` one of the agent's, is not finite. Waits for the device."""
        last = 0.0 if loss is None else float(loss)
        if not math.isfinite(last) or (weights and not self._agent.is_finite()):
            self._step = step
            cause = f"training has diverged, the loss is {last} and the weights may not be numbers any more"
            raise self.stopped(cause, "start elsewhere with a lower LEARNING_RATE or --PRECISION=float32")

    def due(self, step: int) -> bool:
        """After every iteration: whether a checkpoint is due, every CHECKPOINT_FREQ steps and after a signal."""
        beats, self._beats = self._beats, step // self._constants["CHECKPOINT_FREQ"]
        self._step = step
        return step < self._constants["MAX_STEPS"] and (beats != self._beats or self._signal != 0)

    def save(self, step: int, loss: Tensor | None) -> None:
        """Write a checkpoint; after it everything has to start anew from (SEED, step). After a signal the run ends."""
        self.check(step, loss, weights=True)
        self._save()
        if self._signal:  # before the step or while saving
            self._leave()

    def finish(self) -> None:
        """After the last step."""
        best = max(self.evaluations, key=lambda evaluation: evaluation.mean)
        self._record |= {"finished": self._step, "best": f"model_{best.number:03d}", "score": best.mean}
        self._write_record()

    def hang_up(self) -> None:
        """End the run as a lost terminal does. Raises Stopped."""
        _be_silent()
        self._signal = signal.SIGHUP
        self._leave()

    def stopped(self, cause: str, remedy: str) -> Stopped:
        """The exception that ends the run at this step."""
        there = self._checkpoints()
        kept = f"the last good checkpoint is {there[-1]}" if there else "there is no checkpoint"
        return Stopped(f"step {self._step:,}: {cause}; rewards.txt and the models are kept, {kept}; {remedy}", 1)

    def _on_signal(self, number: int, _) -> None:
        self._signal = number
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # the terminal may be gone; print could be in the middle of itself
            os.write(2, f"\n{name}: stopping in order; a second one leaves at once\n".encode())
        for each in SIGNALS:  # a second one ends the process at once, whatever it is doing; hangups come in pairs
            signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else signal.SIG_DFL)
        if number == signal.SIGHUP:
            _be_silent()
        if self._abort:
            self._abort = False
            raise KeyboardInterrupt

    def _leave(self) -> None:
        name, status = signal.Signals(self._signal).name, 128 + self._signal
        if self._step == 0:
            raise Stopped(f"stopped before the first step by {name}; start again with: {command_line()}", status)
        if self._record["checkpoint"] != self._step:
            self._save()
        raise Stopped(f"stopped at step {self._step:,} by {name}; go on with: {command_line()}", status)

    def _minutes(self) -> float:
        return (time.monotonic() - self._began) / 60

    def _path(self, step: int) -> Path:
        return self.models / f"checkpoint_{step:010d}"

    def _checkpoints(self) -> list[Path]:
        """Those there are, oldest first."""
        return sorted(self.models.glob("checkpoint_" + 10 * "[0-9]"))

    def _save(self) -> None:
        state = {"run": self._record["run"], "constants": self._constants, "step": self._step}
        state |= {"minutes": self._minutes(), "evaluations": [tuple(evaluation) for evaluation in self.evaluations]}
        state |= {"agent": self._agent.state_dict(), "memory": self._memory.state_dict()}
        write_whole(self._path(self._step), lambda file: torch.save(state, file))
        self._record["checkpoint"] = self._step
        self._write_record()
        for old in self._checkpoints()[:-2]:
            old.unlink()

    def _load(self, path: Path) -> None:
        """Load the checkpoint at `path` into the run, its agent and its memory, and run no code out of it.

        Raises ConfigError if it is not what the run wrote there, and whatever else damaged bytes lead to.
        """
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch.load does not look at the checksums
                raise ConfigError("it is damaged")
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if state["run"] != self._record["run"]:
            raise ConfigError("it is of another run")
        if changed := _changed(state["constants"], self._constants):
            raise ConfigError(f"it is of a run with {changed}")
        if path != self._path(state["step"]):
            raise ConfigError(f"it was written as {self._path(state['step']).name}")
        self._agent.load_state_dict(state["agent"])
        self._memory.load_state_dict(state["memory"])
        self.evaluations = [Evaluation(*evaluation) for evaluation in state["evaluations"]]
        self._step, self._began = state["step"], time.monotonic() - 60 * state["minutes"]

    def _announce(self, good: Path | None, refused: dict[Path, str]) -> None:
        """Say where the run goes on, and set aside what was refused. Raises ConfigError if nothing good is left."""
        last = self._record["checkpoint"]
        reasons = [f"{path} is refused: {reason}" for path, reason in refused.items()]
        if last is not None and last > self._step and self._path(last) not in refused:
            reasons.append(f"{self._path(last)} is missing")
        if reasons and not good:
            told = f"{'; '.join(reasons)}; {REWARDS} and the models are kept"
            raise ConfigError(f"{told}; put a good copy of a checkpoint back, or {ELSEWHERE}")
        for path in refused:
            os.replace(path, f"{path}.refused")
        for reason in reasons:
            print(f"{reason}; going on from the one before", file=sys.stderr)
        if good:
            print(f"going on at step {self._step:,} from {good}", file=sys.stderr)
        elif self._record["starts"]:
            print("there was no checkpoint yet: this run begins again", file=sys.stderr)

    def _clean(self) -> None:
        """Take back what was written after the checkpoint, but the models: each is written over in its turn."""
        if self.evaluations:
            rows = "".join(evaluation.row for evaluation in self.evaluations)
            write_whole(REWARDS, lambda file: file.write(rows.encode()))
        else:
            REWARDS.unlink(missing_ok=True)
        for half in self.models.glob("checkpoint_*.tmp"):
            half.unlink()
        for pictures in Path(".").glob("eval_*/"):
            number = pictures.name.removeprefix("eval_")
            if number.isdigit() and int(number) >= len(self.evaluations):
                shutil.rmtree(pictures)

    def _write_record(self) -> None:
        write_whole(RECORD, lambda file: file.write(json.dumps(self._record, indent=2).encode() + b"\n"))


def _be_silent() -> None:
    """Write nowhere from now on: nobody reads it, and to try would raise."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _lock(directory: Path, stack: contextlib.ExitStack) -> None:
    handle = os.open(directory, os.O_RDONLY)
    stack.callback(os.close, handle)  # and the lock is gone, as it is when the process dies
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"another run is at work in {directory.resolve()}; wait for its end or start elsewhere"
        ) from None


def _read_record(values: dict) -> dict | None:
    """The record of the run here, if there is one. One with other constants and no results makes way for a new one.

    Raises ConfigError if it is damaged, or has other constants and results, and Stopped if it is over.
    """
    try:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
        changed = _changed(record["constants"], values)
        models = _models(record["constants"])
        kinds = {"run": str, "starts": list, "checkpoint": int | None, "finished": int | None}
        whole = all(isinstance(record[name], kind) for name, kind in kinds.items())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ConfigError(f"{RECORD} is damaged; put a good one back, or {ELSEWHERE}")
    if changed:
        if not _discard(record, models):
            raise ConfigError(f"the run in this directory has {changed}; give it the same, or {ELSEWHERE}")
        print(f"the run in this directory had {changed}, and no results: a new one takes its place", file=sys.stderr)
        return None
    if record["finished"] is not None:
        told = f"this run is finished, at step {record['finished']:,}; start another one elsewhere"
        if "best" in record:
            watch = shlex.join(["python", sys.argv[0], f"--PLAY={models / record['best']}"])
            told += f"; its best model has a mean score of {record['score']:.1f}, watch it with: {watch}"
        raise Stopped(told, 0)
    return record


def _new_record(values: dict, models: Path) -> dict:
    """The record of a run that begins. Raises ConfigError where there are results of an earlier one."""
    for old in _results(models):
        raise ConfigError(f"{old} is from an earlier run; {ELSEWHERE}")
    return {"run": uuid.uuid4().hex, "constants": values, "checkpoint": None, "finished": None, "starts": []}


def _models(values: dict) -> Path:
    """The directory of the models; ~ is the home directory."""
    return Path(os.path.expanduser(values["SAVE_PREFIX"]))


def _results(models: Path) -> list[Path]:
    """What a run with these `models` has written."""
    saved = (*models.glob("model_*"), *models.glob("checkpoint_*"))
    return [path for path in (REWARDS, *saved, PICTURE, CURVES, *Path(".").glob("eval_*")) if path.exists()]


def _discard(record: dict, models: Path) -> bool:
    """Remove a run that has learned nothing yet and was evaluated at step 0 at most. False, and all stays, otherwise.

    The record goes last, so that the next start ends what is cut off here. Raises OSError for what is not the run's.
    """
    results, warm = _results(models), record["constants"]["WARM_STEPS"]
    checkpoint = record["checkpoint"] or 0
    removable = (*UNTRAINED, f"checkpoint_{checkpoint:010d}")
    more = [path for path in results if path.name not in removable and path.suffix != ".tmp"]
    steps = REWARDS.read_bytes().split()[1::3] if REWARDS in results else []
    if more or steps not in ([], [b"0"]) or checkpoint > warm or record["finished"] is not None:
        return False
    with contextlib.ExitStack() as stack:
        if models.is_dir() and not models.samefile("."):
            _lock(models, stack)
        for path in results:
            if path.is_dir():
                for file in (*path.glob("events.*"), *path.glob("*.png")):
                    file.unlink()
                path.rmdir()
            else:
                path.unlink()
        RECORD.unlink()
    return True


def _changed(before: dict, now: dict) -> str:
    """The first constant of a run that is not what it was, in words, or nothing."""
    names = [name for name in before | now if name not in FREE and before.get(name) != now.get(name)]
    return f"{names[0]}={before.get(names[0])}, not {now.get(names[0])}" if names else ""
