"""The constants of main.py: overridden from the command line, checked before anything is allocated or written."""

import argparse
import contextlib
import ctypes
import difflib
import errno
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch

from utils_env import normalize_game
from utils_memory import ReplayMemory, free_bytes

HEADROOM = 1 << 30  # bytes left free beside the replay memory, for networks, emulators and whatever else runs
PACKAGES = ("torch", "numpy", "gymnasium", "ale-py")  # that decide what a run does

MOST = {  # far beyond what is useful, and short of what the machine or the emulators would choke on
    "NUM_ENVS": 4096,
    "EVAL_EPISODES": 4096,
    "STACK_SIZE": 64,
    "FRAME_SKIP": 60,
    "BATCH_SIZE": 8192,
    "N_STEP": 1000,
    "QUANTILES": 1000,
    "ATOMS": 1000,
}


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
    """A text stream that somebody reads. When nobody does any more, SIGHUP is raised, as for a lost terminal."""

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
        told, status = f"error: out of memory: {refused}; free some, or lower MEM_SIZE", 1
    try:
        print(told, file=sys.stderr)
    except OSError:
        fall_silent(sys.stderr)
    return status


def override(module: dict, arguments: list[str]) -> None:
    """Set constants in `module` from arguments such as --GAME=pong; `--help` prints them all and exits.

    A constant is an annotated upper-case name. Spelling is free in case and in - or _. Raises ConfigError.
    """
    description = module["__doc__"].partition(":")[0] + ". In brackets: the default."
    parser = _Parser(usage="python main.py [--CONSTANT=value ...]", description=description, allow_abbrev=False)
    comments = _comments(module["__file__"])
    types = constants(module)
    for name, kind in types.items():
        default = f"{module[name]:_}" if kind is int else str(module[name])
        text = f"{comments.get(name, '')}{default and f' [{default}]'}".replace("%", "%%").strip()
        parser.add_argument(f"--{name}", type=_reader(name, kind), metavar=kind.__name__, help=text)
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110)
    parsed = parser.parse_args([_spell(argument) for argument in arguments])
    module.update({name: value for name, value in vars(parsed).items() if value is not None})


def constants(module: dict) -> dict[str, type]:
    """Names and types of the constants in `module`, in the order they stand there."""
    return {name: kind for name, kind in module["__annotations__"].items() if name.isupper()}


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
            raise ConfigError(f"{name} must be {_article(kind)}, not {text!r}") from None

    return read


def _article(kind: type) -> str:
    return {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}[kind]


def check(module: dict) -> None:
    """Raise ConfigError, with one sentence, if the constants in `module` are ill-typed, out of range or at odds."""
    for name, kind in constants(module).items():
        value = module[name]
        if kind is float and type(value) is int:
            module[name] = float(value)
        elif kind is int and type(value) is float and value.is_integer():  # 1e6, as on the command line
            module[name] = int(value)
        elif type(value) is not kind:
            raise ConfigError(f"{name} must be {_article(kind)}, not {value!r}")
    c = argparse.Namespace(**{name: module[name] for name in constants(module)})
    try:
        _check(c)
    except AttributeError as error:
        if error.obj is not c:
            raise
        raise ConfigError(f"main.py has no constant {error.name} any more") from None


def _check(c: argparse.Namespace) -> None:
    def need(holds: bool, sentence: str) -> None:
        if not holds:
            raise ConfigError(sentence)

    try:
        normalize_game(c.GAME)
    except ValueError as error:
        raise ConfigError(f"GAME: {error}") from None
    positive = (
        "MAX_STEPS NUM_ENVS STACK_SIZE FRAME_SKIP EPS_DECAY BETA_STEPS BATCH_SIZE POLICY_UPDATE TARGET_UPDATE "
        "WARM_STEPS MEM_SIZE N_STEP AVERAGE_STEPS QUANTILES ATOMS EVALUATE_FREQ EVAL_EPISODES"
    )
    for name in positive.split():
        need(getattr(c, name) >= 1, f"{name} must be at least 1, not {getattr(c, name)}")
    for name, most in MOST.items():
        need(getattr(c, name) <= most, f"{name} must be at most {most}, not {getattr(c, name)}")
    for name in ("EPS_START", "EPS_END", "EVAL_EPS", "GAMMA", "ALPHA", "BETA_START"):
        need(0 <= getattr(c, name) <= 1, f"{name} must be from 0 to 1, not {getattr(c, name)}")
    for name in ("LEARNING_RATE", "ADAM_EPS"):
        need(0 < getattr(c, name) < float("inf"), f"{name} must be a positive number, not {getattr(c, name)}")
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
    least = (c.STACK_SIZE + c.N_STEP) * c.NUM_ENVS
    need(
        least <= c.MEM_SIZE,
        f"MEM_SIZE ({c.MEM_SIZE}) is too small for NUM_ENVS ({c.NUM_ENVS}): it must be at least {least}",
    )
    least = (c.N_STEP + 1) * c.NUM_ENVS
    need(
        least <= c.WARM_STEPS,
        f"WARM_STEPS ({c.WARM_STEPS}) is too small for NUM_ENVS ({c.NUM_ENVS}): it must be at least {least}",
    )
    for name in ("EVALUATE_FREQ", "TARGET_UPDATE", "CHECKPOINT_FREQ"):
        every = getattr(c, name)
        need(
            every >= c.NUM_ENVS, f"{name} ({every}) must be at least NUM_ENVS ({c.NUM_ENVS}), the steps of an iteration"
        )
    need(c.PRECISION in DTYPES, f"PRECISION must be one of {', '.join(DTYPES)}, not {c.PRECISION!r}")
    choose_device(c.DEVICE)


def choose_device(name: str) -> torch.device:
    """The device `name`, or for "auto" CUDA when there is one, else MPS, else the CPU. Raises ConfigError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"DEVICE {name!r} is not there; try auto or cpu") from None
    return device


DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The arithmetic `name`, or for "auto" bfloat16 where the device computes in it, else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = (
            device.type == "cpu"
            and torch.cpu._is_avx512_bf16_supported()
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
    return torch.bfloat16 if fast else torch.float32


def prepare(device: torch.device, precision: str, threads: int) -> torch.dtype:
    """Set up the process for training on `device` with `threads` threads, and return the arithmetic `precision`."""
    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs are made on the current one, and it is asked for bfloat16
    dtype = choose_dtype(precision, device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # the shapes never change, so the fastest algorithms are worth a search
        if precision == "float32":  # the reference: by default convolutions round their factors to TF32's 10 bits
            torch.backends.cudnn.conv.fp32_precision = "ieee"
    return dtype


def choose_storage(
    device: torch.device, memory: type[ReplayMemory], mem_size: int, num_envs: int
) -> tuple[torch.device, str]:
    """Where the replay memory goes, and a sentence that says what it takes: on a GPU with room for it, else in RAM.

    Raises ConfigError, with needed and free bytes and a `mem_size` that would fit, if it fits nowhere.
    """
    needed = memory.needed_bytes(mem_size, num_envs)
    places = [device] if device.type == "cuda" else []  # MPS has no float64, and shares the RAM anyway
    for place in (*places, torch.device("cpu")):
        free = free_bytes(place)
        sentence = f"replay memory for {mem_size:,} steps: {needed / 1e9:.2f} GB on {place}, {free / 1e9:.2f} GB free"
        if needed + HEADROOM <= free:
            return place, sentence
    remedy = make_fit((free - HEADROOM) / needed * mem_size)
    raise ConfigError(f"the {sentence}, of which {HEADROOM / 1e9:.1f} must stay free; {remedy}")


def make_fit(mem_size: float) -> str:
    """What to do where there is room for a replay memory of `mem_size` steps only."""
    fits = int(mem_size) // 10_000 * 10_000
    return f"free some, or begin a run with --MEM_SIZE={fits:_}" if fits > 0 else "free some, or lower MEM_SIZE"


def check_disk(constants: dict, directory: Path, memory: type[ReplayMemory]) -> str:
    """A sentence on the disk space that checkpoints take. Raises ConfigError if it is not there."""
    sizes = {"capacity": constants["MEM_SIZE"], "num_envs": constants["NUM_ENVS"]}
    memory_bytes = memory.saved_bytes(**sizes, steps=constants["MAX_STEPS"])
    outputs = max(constants["QUANTILES"], constants["ATOMS"])
    networks = 20 * ((4 << 20) + 19 * 513 * outputs)  # three and Adam's moments, in float32, of 18 actions, dueling
    size = memory_bytes + networks
    most = 3  # two, and one being written
    there = (*directory.glob("checkpoint_" + 10 * "[0-9]"), *directory.glob("checkpoint_*.tmp"))  # they make way
    free = shutil.disk_usage(directory).free + sum(old.stat().st_size for old in there)
    needed = f"up to {size / 1e9:.2f} GB each, at most {most} at a time with the one that is being written"
    sentence = f"checkpoints: {needed}, {free / 1e9:.2f} GB free on the disk"
    if most * size > free:
        full = memory.saved_bytes(**sizes, steps=constants["MEM_SIZE"])
        remedy = make_fit((free / most - networks) / full * constants["MEM_SIZE"])
        raise ConfigError(f"{sentence}; {remedy}")
    return sentence


def keep_freed_memory() -> None:
    """Let glibc keep the memory that is freed. By default it hands blocks of megabytes back to the system, and every
    update has to fault its own in anew: a tenth of the learner's time on a CPU. Elsewhere nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # the numbers of M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in malloc.h
    mallopt(mmap_threshold, 32 << 20)  # the largest that is allowed
    mallopt(trim_threshold, 1 << 30)


def out_of_memory(error: Exception) -> str:
    """What `error` says if an allocation was refused, else nothing; torch and its libraries have words of their own."""
    told = str(error)
    refused = "can't allocate memory" in told or os.strerror(errno.ENOMEM) in told  # for tensors, for mapped files
    refused |= told.startswith("CUDA error: out of memory") or "STATUS_ALLOC_FAILED" in told  # a GPU's libraries
    refused |= told == "could not create a primitive" or isinstance(error, MemoryError | torch.OutOfMemoryError)
    return (told or "an allocation was refused").splitlines()[0] if refused else ""


def describe_start(device: torch.device, constants: dict) -> dict:
    """What there is to know about a start of the program with `constants` on `device`."""
    commit = _git("rev-parse", "HEAD")
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "command": command_line(),
        **describe_device(device, constants["PRECISION"]),
        **describe_hardware(device),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "commit": commit,
        "dirty": None if commit is None else bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def describe_device(device: torch.device, precision: str) -> dict[str, str]:
    """What computes, and how."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{device} ({platform.machine()}, {name}), {count(torch.get_num_threads(), 'thread')}",
        "precision": str(choose_dtype(precision, device)).removeprefix("torch."),
    }


def describe_hardware(device: torch.device) -> dict[str, str | int]:
    """The processor and how many cores of it there are to use, and the GPU and its CUDA where `device` is one."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if device.type == "cuda" else {}
    return {"cpu": cpu, "cores": cores, **gpu}


def count(number: int, noun: str) -> str:
    """So many of them in words: 1 game, 10 games."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def command_line() -> str:
    """The command that started the program, as a shell reads it."""
    return shlex.join(["python", *sys.argv])


def _git(*arguments: str) -> str | None:
    """What git says about this program, or None where it says nothing."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
