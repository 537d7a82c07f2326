"""The files of a run: what they are called, and how one is written so that it is whole or not there."""

import contextlib
import errno
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

RECORD, REWARDS, PICTURE, CURVES = Path("run.json"), Path("rewards.txt"), Path("rewards.png"), Path("curves")
OWNER = "run.id"  # file in SAVE_PREFIX that names the run whose models are there
NUMBER = r"(\d{3}|[1-9]\d{3,})"  # of an evaluation
MODEL = re.compile(rf"model_{NUMBER}")
# In SAVE_PREFIX; all else there is the user's.
SAVED = re.compile(rf"({MODEL.pattern}|checkpoint_\d{{10}})(\.tmp|\.refused)?")
RECORDING = re.compile(rf"eval_{NUMBER}(\.gif)?")
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # what file systems answer that cannot sync a directory


def model_name(number: int) -> str:
    """The file in SAVE_PREFIX with the model of evaluation `number`."""
    return f"model_{number:03d}"


def recording_name(number: int) -> str:
    """The directory with the pictures of evaluation `number`; its animation has .gif behind that."""
    return f"eval_{number:03d}"


def models_in(directory: Path) -> dict[Path, int]:
    """The models in `directory` and the numbers of their evaluations, in that order."""
    found = {path: MODEL.fullmatch(path.name) for path in directory.glob("model_*")}
    numbers = {path: int(name[1]) for path, name in found.items() if name}
    return dict(sorted(numbers.items(), key=lambda item: item[1]))


def checkpoint_name(step: int) -> str:
    """The file in SAVE_PREFIX with the checkpoint of `step`."""
    return f"checkpoint_{step:010d}"


def checkpoints(models: Path, suffix: str = "") -> list[Path]:
    """Those in the directory `models`, oldest first; with `suffix` .tmp those that are not finished."""
    return sorted(models.glob("checkpoint_" + 10 * "[0-9]" + suffix))


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint is of."""
    return int(checkpoint.name.removeprefix("checkpoint_"))


def saved(models: Path) -> list[Path]:
    """All models and checkpoints in the directory `models`, finished or not."""
    return sorted(path for path in models.glob("*_*") if SAVED.fullmatch(path.name))


def recordings() -> dict[Path, int]:
    """The pictures and animations of evaluations that are here, and the numbers of those."""
    found = {path: RECORDING.fullmatch(path.name) for path in sorted(Path(".").glob("eval_*"))}
    return {path: int(name[1]) for path, name in found.items() if name and path.is_dir() == (name[2] is None)}


def remove(path: Path) -> None:
    """Remove a file, or a directory of curves or pictures. Raises OSError if there is more in it, which stays."""
    if path.is_dir():
        for file in path.glob("events.*" if path == CURVES else 6 * "[0-9]" + ".png"):
            file.unlink()
        path.rmdir()
    else:
        path.unlink()


def write_whole(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """`write` a file that appears at `path` whole or not at all, even if the machine goes down. Raises OSError."""
    path = os.fspath(path)
    try:
        with open(f"{path}.tmp", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
        _sync_directory(os.path.dirname(path) or ".")
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(f"{path}.tmp")
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides what stopped it
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, path) from error
        raise


def _sync_directory(directory: str) -> None:
    """Or the name of a new file may be lost."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(handle)


def is_whole(path: str | os.PathLike) -> bool:
    """Whether what torch.save wrote at `path` is undamaged, which torch.load does not look at.

    Raises OSError where the file cannot be read, and MemoryError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except MemoryError:
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:  # damaged bytes may name a place before the file's beginning
            raise
        return False
    except Exception:  # they raise any of a dozen kinds
        return False
