"""A run on disk: its checkpoints, and what ends it: signals, diverged training, full disks.

A checkpoint holds all that training has learned and remembers, but no random states and no emulators: after it, games
and random numbers start anew from (SEED, step), in the run that goes on as in the run that comes back. So a run that
is killed and started again with the same command does, on a CPU, bit for bit what it would have done.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils_config import ConfigError, Stopped, command_line, out_of_memory
from utils_files import (
    REWARDS,
    checkpoint_name,
    checkpoints,
    is_whole,
    model_name,
    models_in,
    recordings,
    remove,
    write_whole,
)
from utils_machine import check_disk, choose_storage, count_memory, describe_start
from utils_memory import ReplayMemory
from utils_record import ELSEWHERE, Record, changed, claim, discard
from utils_types import Evaluation, best_of

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last when the terminal goes, unless under nohup


@contextlib.contextmanager
def open_run(constants: dict, device: torch.device, memory: type[ReplayMemory]) -> Iterator["Run"]:
    """The run of these `constants`, new or gone on with, in the current directory and in their SAVE_PREFIX.

    Raises ConfigError where its results cannot go or would mix with others, and Stopped for a run that has finished,
    or stops inside for a reason that a sentence can tell.
    """
    with contextlib.ExitStack() as stack:
        try:
            record, replaced = claim(constants, stack)
            storage, room = choose_storage(device, memory, count_memory(constants), constants["NUM_ENVS"])
            room += f"\n{check_disk(constants, record.models, memory)}"
        except OSError as error:
            told = f"cannot write to {error.filename}: {error.strerror} (SAVE_PREFIX {constants['SAVE_PREFIX']})"
            raise ConfigError(told) from None
        run = Run(record, replaced, constants, device, storage, room)
        show = threading.excepthook
        stack.callback(setattr, threading, "excepthook", show)  # the curves' thread hands its OSError on to the log
        threading.excepthook = lambda failed: None if isinstance(failed.exc_value, OSError) else show(failed)
        try:
            try:
                for number in SIGNALS:
                    stack.callback(signal.signal, number, before := signal.getsignal(number))
                    if before != signal.SIG_IGN:
                        signal.signal(number, run.on_signal)
                yield run
            except KeyboardInterrupt:
                run.leave()
            run.finish()
        except OSError as error:
            cause = f"cannot write {os.fsdecode(error.filename or 'results')}: {error.strerror}"
            raise run.stopped(cause, "mend that and give the same command again") from error
        except (MemoryError, RuntimeError) as error:
            if not (refused := out_of_memory(error)):
                raise
            told = f"out of memory: {refused}"
            raise run.stopped(told, "free some and give the same command again") from error


def last_evaluation(steps: int, constants: dict) -> int:
    """The number of the last evaluation in a run of so many steps: off the beat of EVALUATE_FREQ there is one more."""
    games, every = constants["NUM_ENVS"], constants["EVALUATE_FREQ"]
    end = -(-steps // games) * games  # of the last iteration
    return end // every + (end // every == (end - games) // every)


class Run:
    """One run, from its first start to its end; made by `open_run`.

    `step` is for the loop to set after each iteration: that of the state which a checkpoint would hold now.
    """

    def __init__(
        self,
        record: Record,
        replaced: Record | None,  # the run whose place this one takes
        constants: dict,
        device: torch.device,
        storage: torch.device,
        room: str,
    ):
        self.models, self.storage = record.models, storage  # where its models go, and the replay memory
        self.room = room  # that memory and checkpoints take, in words
        self.constants, self._record, self._replaced, self._device = constants, record, replaced, device
        self.evaluations: list[Evaluation] = []
        self._began = time.monotonic()  # less what the run had worked for before
        self.step = 0
        self._signal = 0
        self._abort = True  # whether a signal may end what is going on
        self._resumed = False

    def resume(self, agent, memory) -> int:
        """Bring both, and rewards.txt, to the newest good checkpoint; return its step, or 0 if there never was one.

        A run whose place this one takes is removed first. Raises ConfigError if no checkpoint is good any more, or the
        newest cannot be read though it may be good. A signal until one is read, or until the removal, ends the run, and
        nothing is changed.
        """
        self._agent, self._memory = agent, memory
        if self._replaced:
            self._abort = False
            self._take_its_place(self._replaced)
        refused, good = {}, None
        for path in reversed(checkpoints(self.models)):
            print(f"reading {path}", file=sys.stderr)
            try:
                self._load(path)
                good = path
                break
            except ConfigError as error:
                refused[path] = str(error)
            except OSError as error:
                remedy = "mend that, or move it away to go on from the one before"
                raise ConfigError(f"cannot read {path}: {error.strerror}; {remedy}") from None
            except Exception as error:  # whatever strange values lead to
                if out_of_memory(error):
                    raise
                refused[path] = f"it cannot be taken up ({type(error).__name__}: {' '.join(str(error).split())})"
        self._abort = False  # from here on files change
        self._announce(good, refused)
        self._record.checkpoint = self.step if good else None
        self._clean()
        start = {"step": self.step, **describe_start(self._device, self.constants)}
        if self._record.starts:
            last = self._record.starts[-1]
            compared = {key: value for key, value in start.items() if key not in ("step", "time", "command")}
            change = [f"{key} was {last.get(key)}, is {now}" for key, now in compared.items() if now != last.get(key)]
            if change:
                print(f"perhaps not bit for bit as before: {'; '.join(change)}", file=sys.stderr)
        self._record.starts.append(start)
        self._record.write()
        self._resumed = True
        return self.step

    def _take_its_place(self, replaced: Record) -> None:
        change = changed(replaced.constants, self.constants)
        print(f"the run in this directory had {change}, and no results: a new one takes its place", file=sys.stderr)
        try:
            discard(replaced, self.models)
        except OSError as error:
            told = f"cannot remove {error.filename}: {error.strerror}; mend that and give the same command again"
            raise ConfigError(told) from None

    @property
    def is_evaluated(self) -> bool:
        """Whether rewards.txt has a row for this step."""
        return bool(self.evaluations) and self.evaluations[-1].step == self.step

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A part of the run that changes nothing of what a checkpoint holds: a signal ends it early."""
        try:
            self._abort = True
            if self._signal:
                raise KeyboardInterrupt
            yield
        finally:
            self._abort = False

    def report(self, scores: np.ndarray) -> None:
        """Append the row of the next evaluation to rewards.txt, with the mean of the games' `scores`."""
        evaluation = Evaluation(len(self.evaluations), self.step, self._minutes(), scores.tolist())
        try:
            with open(REWARDS, "a") as file:
                file.write(evaluation.row)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(REWARDS)) from error
        self.evaluations.append(evaluation)

    def check(self, loss: Tensor | None, weights: bool = False) -> None:
        """Raise Stopped if `loss`, or with `weights` one of the agent's, is not finite. Waits for the device."""
        last = 0.0 if loss is None else float(loss)
        found = "" if math.isfinite(last) else f"the loss is {last}"
        if weights and not self._agent.is_finite():
            found = "a weight is no finite number any more"
        if found:
            cause = f"training has diverged, {found}"
            raise self.stopped(cause, "start elsewhere with a lower LEARNING_RATE or --PRECISION=float32")

    def checkpoint_due(self) -> bool:
        """Whether the loop should `save` after this iteration: every CHECKPOINT_FREQ steps, and after a signal."""
        every = self.constants["CHECKPOINT_FREQ"]
        regular = self.step // every != (self.step - self.constants["NUM_ENVS"]) // every
        return self.step < self.constants["MAX_STEPS"] and (regular or self._signal != 0)

    def save(self, loss: Tensor | None) -> None:
        """Write a checkpoint; after it everything has to start anew from (SEED, step). After a signal the run ends."""
        self.check(loss, weights=True)
        self._save()
        if self._signal:  # before the step or while saving
            self.leave()

    def finish(self) -> None:
        """After the last step: keep what a larger MAX_STEPS would go on from, and no more of that."""
        if self._record.checkpoint != self.step:
            print("writing the last checkpoint", file=sys.stderr)
            self._save()
        self._prune(1)
        best = best_of(self.evaluations)
        self._record.finished, self._record.best, self._record.score = self.step, model_name(best.number), best.mean
        self._record.write()

    def stopped(self, cause: str, remedy: str) -> Stopped:
        """The exception that ends the run at this step."""
        there = checkpoints(self.models)
        last = f"the last good checkpoint is {there[-1]}" if there else "there is no checkpoint"
        kept = f"; rewards.txt and the models are kept, {last}" if there or self.evaluations or self.step else ""
        return Stopped(f"step {self.step:,}: {cause}{kept}; {remedy}", 1)

    def on_signal(self, number: int, _) -> None:
        """Note the signal `number`. Raises KeyboardInterrupt where that may end what is going on."""
        self._signal = number
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # the terminal may be gone; print could be in the middle of itself
            os.write(2, f"\n{name}: stopping in order; a second one leaves at once\n".encode())
        for each in SIGNALS:  # a second one ends the process at once, whatever it is doing; hangups come in pairs
            if signal.getsignal(each) != signal.SIG_IGN:
                signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else signal.SIG_DFL)
        if self._abort:
            self._abort = False
            raise KeyboardInterrupt

    def leave(self) -> None:
        """End the run as the signal demands, with a checkpoint if it has come on since the last. Raises Stopped."""
        number = self._signal or signal.SIGINT  # which may come before on_signal knows of it
        name, status = signal.Signals(number).name, 128 + number
        if not self._resumed or self.step == 0:
            where = "before the first step" if self._resumed else "while starting, nothing is changed,"
            raise Stopped(f"stopped {where} by {name}; start again with: {command_line()}", status)
        if self._record.checkpoint != self.step:
            print("writing a checkpoint", file=sys.stderr)
            self._save()
        raise Stopped(f"stopped at step {self.step:,} by {name}; go on with: {command_line()}", status)

    def _minutes(self) -> float:
        return (time.monotonic() - self._began) / 60

    def _path(self, step: int) -> Path:
        return self.models / checkpoint_name(step)

    def _save(self) -> None:
        state = {"run": self._record.run, "constants": self.constants, "step": self.step, "minutes": self._minutes()}
        # One at the end of a run may lie off the beat; a longer run has none there, and gives its number to the next.
        regular = [each for each in self.evaluations if each.number == each.step // self.constants["EVALUATE_FREQ"]]
        state["evaluations"] = [tuple(evaluation) for evaluation in regular]
        state |= {"agent": self._agent.state_dict(), "memory": self._memory.state_dict()}
        write_whole(self._path(self.step), lambda file: torch.save(state, file))
        self._record.checkpoint = self.step
        self._record.write()
        self._prune()

    def _prune(self, kept: int = 2) -> None:
        """Keep the last `kept` checkpoints: the newest, and one for when it turns out damaged."""
        for old in checkpoints(self.models)[:-kept]:
            old.unlink()

    def _load(self, path: Path) -> None:
        """Load the checkpoint at `path` into the run, its agent and its memory, and run no code out of it.

        Raises ConfigError if it is not what the run wrote there, OSError if it cannot be read, and whatever else
        strange values lead to.
        """
        if not is_whole(path):
            raise ConfigError("it is damaged")
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if state["run"] != self._record.run:
            raise ConfigError("it is of another run")
        # SAVE_PREFIX tells where it was then.
        constants = {**state["constants"], "SAVE_PREFIX": self.constants["SAVE_PREFIX"]}
        if change := changed(constants, self.constants):
            raise ConfigError(f"it is of a run with {change}")
        if path != self._path(state["step"]):
            raise ConfigError(f"it was written as {self._path(state['step']).name}")
        self._agent.load_state_dict(state["agent"])
        self._memory.load_state_dict(state["memory"])
        self.evaluations = [Evaluation(*evaluation) for evaluation in state["evaluations"]]
        self.step, self._began = state["step"], time.monotonic() - 60 * state["minutes"]

    def _announce(self, good: Path | None, refused: dict[Path, str]) -> None:
        """Say where the run goes on, and set aside what was refused. Raises ConfigError if nothing good is left."""
        last = self._record.checkpoint
        reasons = [f"{path} is refused: {reason}" for path, reason in refused.items()]
        if last is not None and last > self.step and self._path(last) not in refused:
            reasons.append(f"{self._path(last)} is missing")
        if reasons and not good:
            told = f"{'; '.join(reasons)}; {REWARDS} and the models are kept"
            raise ConfigError(f"{told}; put a good copy of a checkpoint back, or {ELSEWHERE}")
        for path in refused:
            os.replace(path, f"{path}.refused")
        for reason in reasons:
            print(f"{reason}; going on from the one before", file=sys.stderr)
        if good:
            print(f"going on at step {self.step:,} from {good}", file=sys.stderr)
        elif self._record.starts:
            print("there was no checkpoint yet: this run begins again", file=sys.stderr)

    def _clean(self) -> None:
        """Take back what was written after the checkpoint, but for the models that are written over in their turn."""
        if self.evaluations:
            rows = "".join(evaluation.row for evaluation in self.evaluations)
            write_whole(REWARDS, lambda file: file.write(rows.encode()))
        else:
            REWARDS.unlink(missing_ok=True)
        for half in checkpoints(self.models, ".tmp"):
            half.unlink()
        self._prune()
        last = last_evaluation(self.constants["MAX_STEPS"], self.constants)
        for model, number in models_in(self.models).items():
            if number > last:  # MAX_STEPS was larger
                model.unlink()
        for pictures, number in recordings().items():
            if number >= len(self.evaluations):
                with contextlib.suppress(OSError):  # there is something of the user's in it, which stays
                    remove(pictures)
