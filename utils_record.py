"""The directories of a run, locked while it is at work, and run.json, the record that says whose results are there."""

import contextlib
import fcntl
import json
import os
import tempfile
import uuid
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

from utils_config import ConfigError, Stopped, command_line, play_command
from utils_env import normalize_game
from utils_files import (
    CURVES,
    OWNER,
    PICTURE,
    RECORD,
    REWARDS,
    checkpoints,
    model_name,
    recording_name,
    recordings,
    remove,
    saved,
    step_of,
    write_whole,
)

FREE = ("MAX_STEPS", "RENDER", "THREADS", "CUDA_GRAPHS", "DEVICE")  # may change; the last three change rounding
FIRST = recording_name(0)
UNTRAINED = (REWARDS.name, PICTURE.name, CURVES.name, model_name(0), FIRST, f"{FIRST}.gif")
ELSEWHERE = (
    "start in another directory (and with another SAVE_PREFIX, if that is a place of its own), "
    f"or move {RECORD}, rewards.*, {CURVES}, eval_[0-9]* and what is in SAVE_PREFIX away"
)


@dataclass
class Record:
    """What a run is, how it came about and how far it has come: the content of run.json, beside its checksum."""

    run: str  # a name that no other run has
    constants: dict
    checkpoint: int | None = None  # step of the newest checkpoint
    finished: int | None = None  # step of the end
    best: str | None = None  # the best model, then, ...
    score: float | None = None  # ... and its mean score
    starts: list[dict] = field(default_factory=list)  # each start of the program, as utils_machine describes it

    @property
    def models(self) -> Path:
        """The directory of the models and checkpoints."""
        return expand(self.constants["SAVE_PREFIX"])

    @property
    def owns_models(self) -> bool:
        """Whether its mark is on the directory of the models."""
        mark = self.models / OWNER
        return mark.exists() and mark.read_bytes() == self.run.encode()

    def go_on(self, values: dict) -> None:
        """Take over `values`, which differ in FREE at most. Raises Stopped or ConfigError if MAX_STEPS is reached."""
        steps = values["MAX_STEPS"]
        if self.finished is not None and steps <= self.finished:
            told = f"this run is finished, at step {self.finished:,}; a larger MAX_STEPS goes on with it, another run"
            told += f" starts elsewhere; its best model has a mean score of {self.score:.1f}, watch it with: "
            raise Stopped(told + play_command(self.models / self.best), 0)
        end = -(-steps // values["NUM_ENVS"]) * values["NUM_ENVS"]  # of the last iteration
        newest = checkpoints(self.models)[-1:] if self.owns_models else []  # a file comes before its record
        last = max([self.checkpoint or 0, *map(step_of, newest)])
        if end < last:
            raise ConfigError(f"MAX_STEPS ({steps}) is behind this run, whose checkpoint is of step {last}")
        self.constants = values
        self.finished = self.best = self.score = None

    def write(self) -> None:
        """Write it to run.json, whole or not at all, and its mark beside the models. Raises OSError."""
        write_whole(self.models / OWNER, lambda file: file.write(self.run.encode()))
        content = asdict(self)
        content["crc32"] = _checksum(content)
        write_whole(RECORD, lambda file: file.write(json.dumps(content, indent=2).encode() + b"\n"))


def claim(values: dict, stack: contextlib.ExitStack) -> tuple[Record, Record | None]:
    """The record of the run of constants `values` in the current directory and SAVE_PREFIX, as it stands or new.

    Both are locked until `stack` closes. A finished run goes on where MAX_STEPS has grown. One that has learned nothing
    makes way for one of other constants: its record comes second, for `discard` once the new one is ready to begin.
    Raises ConfigError where results would mix with others or MAX_STEPS lies behind the run, Stopped for one that is
    over, and OSError where none can go.
    """
    _lock(Path("."), stack)
    there, new = _read(), Record(uuid.uuid4().hex, values)
    change = there and changed(there.constants, values)
    if change and _has_results(there):
        raise ConfigError(f"the run in this directory has {change}; {_same_again(there, values)}, or {ELSEWHERE}")
    if there and not change:
        there.go_on(values)
    made = not new.models.exists()
    new.models.mkdir(parents=True, exist_ok=True)
    if not new.models.samefile("."):
        _lock(new.models, stack)
    if made:
        stack.callback(_remove_empty, new.models)  # while it is still locked, or it could be another run's
    results = saved(new.models) if there else _results(new.models)
    if results and not (there and there.owns_models and there.models.samefile(new.models)):
        raise ConfigError(f"{results[0]} is from another run; {ELSEWHERE}")
    for place in (new.models, "."):
        tempfile.TemporaryFile(dir=place).close()
    return (new, there) if change else (there or new, None)


def discard(record: Record, models: Path) -> None:
    """Remove the run of `record`, which `claim` has found to make way for one with these `models`, locked by now.

    The record goes last, so that the next start ends what is cut off here. Raises ConfigError where another run is at
    work among the old models, and OSError for what is not the run's.
    """
    with contextlib.ExitStack() as stack:
        owned = record.models if record.owns_models else None
        if owned and not any(owned.samefile(locked) for locked in (".", models)):
            _lock(owned, stack)
        for path in _results(owned):
            remove(path)
        if owned:
            (owned / OWNER).unlink()
        RECORD.unlink()


def changed(before: dict, now: dict) -> str:
    """The constants of a run that are not what they were, in words, or nothing."""
    names = [name for name in before | now if name not in FREE and not _same(name, before, now)]
    was = {name: f"{name}={before[name]}" if name in before else f"no {name}" for name in names}
    is_now = {name: f"not {now[name]}" if name in now else "which main.py has no more" for name in names}
    return ", and ".join(f"{was[name]}, {is_now[name]}" for name in names)


def _same_again(there: Record, values: dict) -> str:
    """How the run `there`, whose constants are not `values`, could go on."""
    last = there.starts[-1] if there.starts else {"command": command_line(), "commit": None}
    if there.constants.keys() != values.keys():
        commit = f" (commit {last['commit']})" if last["commit"] else ""
        return f"go on with the version of this program that it ran with{commit}"
    hint = f" (it was last started with: {last['command']})" if last["command"] != command_line() else ""
    return f"give it the same{hint}"


def _same(name: str, before: dict, now: dict) -> bool:
    """Whether the constant `name` means what it did: a game has several spellings, and so has a directory."""
    if name not in before or name not in now:
        return False
    if before[name] == now[name]:
        return True
    if name == "SAVE_PREFIX":
        return os.path.realpath(expand(before[name])) == os.path.realpath(expand(now[name]))
    with contextlib.suppress(ValueError):  # a game that is not shipped any more is another one
        return name == "GAME" and normalize_game(before[name]) == normalize_game(now[name])
    return False


def expand(place: str) -> Path:
    """The directory `place`; ~ is the home directory."""
    return Path(os.path.expanduser(place))


def _read() -> Record | None:
    """The record here, if there is one. Raises ConfigError if it is damaged."""
    try:
        content = json.loads(RECORD.read_text(encoding="utf-8"))
        if content.pop("crc32") == _checksum(content):
            return Record(**content)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ConfigError(f"{RECORD} is damaged or was edited; put a good one back, or {ELSEWHERE}")


def _checksum(content: dict) -> int:
    return zlib.crc32(json.dumps(content).encode())


def _lock(directory: Path, stack: contextlib.ExitStack) -> None:
    handle = os.open(directory, os.O_RDONLY)
    stack.callback(os.close, handle)  # and the lock is gone, as it is when the process dies
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"another run is at work in {directory.resolve()}; wait for its end or start elsewhere"
        ) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(directory)) from None


def _remove_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()


def _results(models: Path | None) -> list[Path]:
    """What a run with these `models` has written."""
    networks = saved(models) if models else ()
    return [path for path in (REWARDS, *networks, PICTURE, CURVES, *recordings()) if path.exists()]


def _has_results(record: Record) -> bool:
    """Whether the run of `record` has a checkpoint of what it learned or an evaluation of it."""
    results, warm = _results(record.models if record.owns_models else None), record.constants["WARM_STEPS"]
    early = [path for path in checkpoints(record.models) if step_of(path) <= warm]
    more = [path for path in results if path.name not in UNTRAINED and path not in early and path.suffix != ".tmp"]
    steps = REWARDS.read_bytes().split()[1::3] if REWARDS in results else []
    learned = (record.checkpoint or 0) > warm or record.finished is not None
    return bool(more) or learned or steps not in ([], [b"0"])
