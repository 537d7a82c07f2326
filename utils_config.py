"""The command: main.py's constants, overridden and checked before anything is allocated or written; how it ends.

`run` calls main() and turns what ends it early into a sentence on stderr and an exit status.
"""

import argparse
import contextlib
import difflib
import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch

from utils_env import LEAST_FRAMES, normalize_game

MOST = {  # far beyond what is useful, and short of what the machine or the emulators would choke on
    "MAX_STEPS": 10**9,
    "NUM_ENVS": 4096,
    "EVAL_EPISODES": 4096,
    "STACK_SIZE": 64,
    "FRAME_SKIP": 60,
    "BATCH_SIZE": 8192,
    "N_STEP": 1000,
    "QUANTILES": 1000,
    "ATOMS": 1000,
    "EVAL_FRAMES": 10**9,
}
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}  # of constants


class Stopped(Exception):
    """What ends the program early; the message is one sentence for the user, `status` the exit status."""

    def __init__(self, sentence: str, status: int):
        super().__init__(sentence)
        self.status = status


class ConfigError(Stopped):
    """Constants that cannot work, or a place that cannot be written."""

    def __init__(self, sentence: str):
        super().__init__(sentence, 2)


class Audience:
    """A text stream that somebody reads. When nobody does any more, SIGHUP is raised, as for a lost terminal.

    Where it is a file on a full disk, what does not fit is lost, and that is no error.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`, or lose it."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            fall_silent(self._stream)
            signal.raise_signal(signal.SIGHUP)


def fall_silent(stream: TextIO) -> None:
    """Let `stream` lead nowhere, or what it still holds would be an error at the end of the process."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def run(main: Callable[[], None], module: dict) -> int:
    """Override the constants in `module` from the command line, call `main`, and return the exit status."""
    try:
        with contextlib.redirect_stderr(Audience(sys.stderr)):
            override(module, sys.argv[1:])
            main()
        return 0
    except Stopped as stop:
        told, status = f"error: {stop}" if stop.status in (1, 2) else str(stop), stop.status
    except (MemoryError, RuntimeError) as error:
        if not (refused := out_of_memory(error)):
            raise
        told, status = f"error: out of memory: {refused}; free some and try again", 1
    try:
        print(told, file=sys.stderr)
    except OSError:
        fall_silent(sys.stderr)
    return status


def override(module: dict, arguments: list[str]) -> None:
    """Set constants in `module` from arguments such as --GAME=pong; `--help` prints them all and exits.

    A constant is an annotated upper-case name. Spelling is free in case and in - or _. Raises ConfigError.
    """
    _check_types(module)
    description = module["__doc__"].partition(":")[0] + ". In brackets: the default."
    parser = _Parser(usage="python main.py [--CONSTANT=value ...]", description=description, allow_abbrev=False)
    comments = _comments(module["__file__"])
    for name, kind in types(module).items():
        default = f"{module[name]:_}" if kind is int else str(module[name])
        text = f"{comments.get(name, '')}{default and f' [{default}]'}".replace("%", "%%").strip()
        parser.add_argument(f"--{name}", type=_reader(name, kind), metavar=kind.__name__, help=text)
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110)
    parsed = parser.parse_args([_spell(argument) for argument in arguments])
    module.update({name: value for name, value in vars(parsed).items() if value is not None})


def types(module: dict) -> dict[str, type]:
    """Names and types of the constants in `module`, in the order they stand there."""
    annotations = sys.modules[module["__name__"]].__annotations__  # from Python 3.14 on they are not in its dict
    return {name: kind for name, kind in annotations.items() if name.isupper()}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        if match := re.match(r"argument --(\w+): expected one argument", message):
            raise ConfigError(f"{match[1]} needs a value: --{match[1]}=...")
        raise ConfigError(message)

    def parse_args(self, arguments):
        names = [action.dest for action in self._actions]
        for argument in arguments:
            name = argument.split("=")[0].removeprefix("--")
            if argument.startswith("-") and name and not _is_number(argument) and name not in (*names, "-h"):
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"the nearest is {near[0]}" if near else "--help lists them all"
                raise ConfigError(f"there is no constant {name}; {hint}")
        parsed, rest = self.parse_known_args(arguments)
        if rest:
            raise ConfigError(f"cannot make sense of {rest[0]!r}; constants are set as --NAME=value")
        return parsed


def _is_number(text: str) -> bool:
    return re.match(r"-[\d.]", text) is not None


def _spell(argument: str) -> str:
    """--learning-rate=1 and --learning_rate=1 as --LEARNING_RATE=1."""
    if argument.lower() == "--help":
        return "--help"
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].upper().replace("-", "_") + equals + value


def _comments(path: str) -> dict[str, str]:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    found = (re.match(r"([A-Z_]+): \w+ = .*?#\s*(.*)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def _reader(name: str, kind: type) -> Callable[[str], object]:
    def read(text: str) -> object:
        if not text:  # a shell variable that is not set; an empty PLAY would train instead
            raise ConfigError(f"{name} needs a value: --{name}=...")
        try:
            if kind is bool:
                return {"true": True, "false": False}[text.lower()]
            if kind is int and not re.fullmatch(r"[-+]?[\d_]+", text):
                number = float(text)  # 1e6 is a whole number too
                if number != int(number):
                    raise ValueError
                return int(number)
            return kind(text)
        except (ValueError, KeyError, OverflowError):
            raise ConfigError(f"{name} must be {KINDS[kind]}, not {text!r}") from None

    return read


def check(module: dict) -> dict:
    """The constants in `module`, by name. Raises ConfigError if they are ill-typed, out of range or at odds."""
    _check_types(module)
    constants = {name: module[name] for name in types(module)}
    c = argparse.Namespace(**constants)
    try:
        _check(c)
    except AttributeError as error:
        if error.obj is not c:
            raise
        raise ConfigError(f"main.py has no constant {error.name} any more") from None
    return constants


def _check_types(module: dict) -> None:
    """Make each constant in `module` what its annotation says, where that means the same. Raises ConfigError."""
    kinds = types(module)
    for name, value in module.items():
        if name.isupper() and name not in kinds and type(value) in KINDS:  # run.json would not tell of it
            raise ConfigError(f"{name} has no type in main.py: write {name}: {type(value).__name__} = {value!r}")
    for name, kind in kinds.items():
        value = module.get(name)
        if kind not in KINDS:
            raise ConfigError(f"{name} must be annotated with one of bool, int, float and str, not with {kind}")
        if kind is float and type(value) is int:
            module[name] = float(value)
        elif kind is int and type(value) is float and value.is_integer():  # 1e6, as on the command line
            module[name] = int(value)
        elif type(value) is not kind:
            raise ConfigError(f"{name} must be {KINDS[kind]}, not {value!r}")


def _check(c: argparse.Namespace) -> None:
    def need(holds: bool, sentence: str) -> None:
        if not holds:
            raise ConfigError(sentence)

    try:
        normalize_game(c.GAME)
    except ValueError as error:
        raise ConfigError(f"GAME: {error}") from None
    positive = (
        "MAX_STEPS NUM_ENVS STACK_SIZE FRAME_SKIP EPS_DECAY LEARNING_RATE_DECAY BETA_STEPS BATCH_SIZE POLICY_UPDATE "
        "TARGET_UPDATE WARM_STEPS MEM_SIZE N_STEP AVERAGE_STEPS QUANTILES ATOMS EVALUATE_FREQ EVAL_EPISODES"
    )
    for name in positive.split():
        need(getattr(c, name) >= 1, f"{name} must be at least 1, not {getattr(c, name)}")
        need(getattr(c, name) <= 10**12, f"{name} must be at most 10**12")
    for name, most in MOST.items():
        need(getattr(c, name) <= most, f"{name} must be at most {most}, not {getattr(c, name)}")
    for name in ("EPS_START", "EPS_END", "EVAL_EPS", "GAMMA", "ALPHA", "BETA_START"):
        need(0 <= getattr(c, name) <= 1, f"{name} must be from 0 to 1, not {getattr(c, name)}")
    sticky = c.REPEAT_ACTION_PROBABILITY
    need(0 <= sticky < 1, f"REPEAT_ACTION_PROBABILITY must be at least 0 and below 1, not {sticky}")
    need(c.EVAL_FRAMES >= LEAST_FRAMES, f"EVAL_FRAMES must be at least {LEAST_FRAMES}, not {c.EVAL_FRAMES}")
    for name in ("LEARNING_RATE", "ADAM_EPS"):
        need(0 < getattr(c, name) < float("inf"), f"{name} must be a positive number, not {getattr(c, name)}")
    factor = c.LEARNING_RATE_END_FACTOR
    need(0 < factor <= 1, f"LEARNING_RATE_END_FACTOR must be above 0 and at most 1, not {factor}")
    need(1e-3 <= c.V_MAX <= 1e6, f"V_MAX must be from 0.001 to 1_000_000, not {c.V_MAX}")
    need(1 in (c.QUANTILES, c.ATOMS), f"QUANTILES ({c.QUANTILES}) or ATOMS ({c.ATOMS}) must be 1")
    need(0 <= c.THREADS <= 1024, f"THREADS must be from 0 to 1024, not {c.THREADS}")
    need(0 <= c.SEED < 2**32, f"SEED must be from 0 to 2**32 - 1, not {c.SEED}")
    need(c.EPS_END <= c.EPS_START, f"EPS_END ({c.EPS_END}) must not be above EPS_START ({c.EPS_START})")
    need(
        c.WARM_STEPS < c.MEM_SIZE,
        f"WARM_STEPS ({c.WARM_STEPS}) must be below MEM_SIZE ({c.MEM_SIZE}), or learning never starts",
    )
    need(c.BATCH_SIZE <= c.WARM_STEPS, f"BATCH_SIZE ({c.BATCH_SIZE}) must not be above WARM_STEPS ({c.WARM_STEPS})")
    # With priorities two rows more: a restart right after a game's end leaves nothing to draw in two on end.
    least = (c.STACK_SIZE + c.N_STEP + 2 * c.PRIORITIZED) * c.NUM_ENVS
    need(
        least <= c.MEM_SIZE,
        f"MEM_SIZE ({c.MEM_SIZE}) is too small for NUM_ENVS ({c.NUM_ENVS}): it must be at least {least}",
    )
    least = (c.N_STEP + 1) * c.NUM_ENVS
    need(
        least <= c.WARM_STEPS,
        f"WARM_STEPS ({c.WARM_STEPS}) is too small for NUM_ENVS ({c.NUM_ENVS}): it must be at least {least}",
    )
    for name in ("EVALUATE_FREQ", "TARGET_UPDATE"):
        every = getattr(c, name)
        need(
            every >= c.NUM_ENVS, f"{name} ({every}) must be at least NUM_ENVS ({c.NUM_ENVS}), the steps of an iteration"
        )
    need(
        c.CHECKPOINT_FREQ >= 2 * c.NUM_ENVS,
        f"CHECKPOINT_FREQ ({c.CHECKPOINT_FREQ}) must be at least twice NUM_ENVS ({c.NUM_ENVS}): games restart there",
    )
    need(c.PRECISION in DTYPES, f"PRECISION must be one of {', '.join(DTYPES)}, not {c.PRECISION!r}")


def out_of_memory(error: Exception) -> str:
    """What `error` says if an allocation was refused, else nothing; torch and its libraries have words of their own."""
    told = str(error)
    refused = "can't allocate memory" in told or os.strerror(errno.ENOMEM) in told  # for tensors, for mapped files
    refused |= told.startswith("CUDA error: out of memory") or "STATUS_ALLOC_FAILED" in told  # a GPU's libraries
    refused |= told == "could not create a primitive" or isinstance(error, MemoryError | torch.OutOfMemoryError)
    return (told or "an allocation was refused").splitlines()[0] if refused else ""


def count(number: int, noun: str) -> str:
    """So many of them in words: 1 game, 10 games."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def command_line() -> str:
    """The command that started the program, as a shell reads it."""
    return shlex.join(["python", *sys.argv])


def play_command(model: Path) -> str:
    """The command that plays a game with `model`, likewise."""
    return shlex.join(["python", sys.argv[0], f"--PLAY={model}"])
