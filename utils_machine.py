"""The machine: the device and its arithmetic, room in memory and on the disk, and what there is to know about it."""

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from utils_config import DTYPES, ConfigError, command_line, count
from utils_files import checkpoints
from utils_memory import ReplayMemory
from utils_model import DQN

DEVICES = ("cuda", "mps", "cpu")
MANY_CORES = 8  # of which the emulators can spare one
HEADROOM = 1 << 30  # bytes left free beside the replay memory, for networks, emulators and whatever else runs
PACKAGES = ("torch", "numpy", "gymnasium", "ale-py")  # that decide what a run does
# In control groups, by their version: the files of limit and usage, and what of that is reclaimable cache, ...
MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
QUOTA_FILES = {1: ("cpu.cfs_quota_us", "cpu.cfs_period_us"), 2: ("cpu.max",)}  # ... and those of quota and period


def choose_device(name: str) -> torch.device:
    """The device `name`, or for "auto" CUDA when there is one, else MPS, else the CPU. Raises ConfigError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in DEVICES:
            raise RuntimeError(f"it is none of {', '.join(DEVICES)}")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\n|\. ", str(error) or type(error).__name__)[0]  # torch goes on for pages
        raise ConfigError(f"DEVICE {name!r} cannot be used: {reason}; --DEVICE=cpu can") from None
    return device


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
    """Set up the process for training on `device`, and return the arithmetic `precision`.

    With `threads` threads of torch; 0: one beside a GPU, else as many as torch has, but no more than cores to use.
    """
    keep_freed_memory()
    # Beside a GPU torch has little to do on the CPU, and its idle threads keep the emulators' cores busy: with 16 of
    # them a run took twice as long.
    if threads or device.type == "cuda":
        torch.set_num_threads(threads or 1)
    elif count_cores() < torch.get_num_threads():  # which knows of no quota; more threads would wait for each other
        torch.set_num_threads(count_cores())
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs are made on the current one, and it is asked for bfloat16
    dtype = choose_dtype(precision, device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # the shapes never change, so the fastest algorithms are worth a search
        if precision == "float32":  # the reference: by default convolutions round their factors to TF32's 10 bits
            torch.backends.cudnn.conv.fp32_precision = "ieee"
    return dtype


def choose_emulator_threads(device: torch.device) -> int:
    """Threads for the emulators: one per core that this process may use. (The vectoriser would count all there are.)

    Many cores leave one to the thread that keeps a GPU busy: with 15 of 16 a run of 32 games made 11% more steps than
    with all while games were short, and as many once they were long.
    """
    cores = count_cores()
    return cores - 1 if device.type == "cuda" and cores >= MANY_CORES else cores


def count_memory(constants: dict) -> int:
    """Steps that the replay memory of a run with `constants` keeps: MEM_SIZE, or less where the run is too short to
    make a difference. So a run that is made longer goes on as if it had been so from the start.
    """
    iterations = -(-constants["MAX_STEPS"] // constants["NUM_ENVS"])
    rows = iterations + constants["STACK_SIZE"] + constants["N_STEP"]  # of a full ring not all are transitions
    return min(constants["MEM_SIZE"], rows * constants["NUM_ENVS"])


def choose_storage(
    device: torch.device, memory: type[ReplayMemory], mem_size: int, num_envs: int
) -> tuple[torch.device, str]:
    """Where the replay memory goes, and a sentence that says what it takes: on a GPU with room for it, else in RAM.

    Raises ConfigError, with needed and free bytes and a `mem_size` that would fit, if it fits nowhere.
    """
    needed = memory.needed_bytes(mem_size, num_envs)
    places = [device] if device.type == "cuda" else []  # MPS has no float64, and shares the RAM anyway
    free = {place: free_bytes(place) for place in (*places, torch.device("cpu"))}
    largest = max(free, key=free.get)
    fitting = next((place for place in free if needed + HEADROOM <= free[place]), None)
    place = fitting or largest
    taken, left = needed / 1e9, free[place] / 1e9
    sentence = f"replay memory for {mem_size:,} steps: {taken:.2f} GB on {place}, {left:.2f} GB free"
    if fitting:
        return place, sentence
    remedy = make_fit((free[largest] - HEADROOM) / needed * mem_size)
    raise ConfigError(f"the {sentence}, of which {HEADROOM / 1e9:.1f} must stay free; {remedy}")


def make_fit(mem_size: float) -> str:
    """What to do where there is room for a replay memory of `mem_size` steps only."""
    fits = int(mem_size) // 10_000 * 10_000
    return f"free some, or begin a run with --MEM_SIZE={fits:_}" if fits > 0 else "free some, or lower MEM_SIZE"


def check_disk(constants: dict, directory: Path, memory: type[ReplayMemory]) -> str:
    """A sentence on the disk space that checkpoints in `directory`, which need not exist, take.

    Raises ConfigError if it is not there.
    """
    capacity, num_envs = count_memory(constants), constants["NUM_ENVS"]
    memory_bytes = memory.saved_bytes(capacity, num_envs, constants["MAX_STEPS"])
    with torch.random.fork_rng(devices=[]):  # the meta device would import torch's compiler, which takes seconds
        shape = {
            name.lower(): constants[name] for name in ("STACK_SIZE", "DUELING", "QUANTILES", "ATOMS", "LAYER_NORM")
        }
        network = DQN(18, **shape)  # with all actions that there may be
    copies = 5  # policy, target, average and Adam's two moments
    networks_bytes = copies * 4 * sum(part.numel() for part in network.parameters())  # in float32
    size = memory_bytes + networks_bytes
    most = 3  # two, and one being written
    there = (*checkpoints(directory), *checkpoints(directory, ".tmp"))  # they make way
    disk = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    free = shutil.disk_usage(disk).free + sum(old.stat().st_size for old in there)
    needed = f"up to {size / 1e9:.2f} GB each, at most {most} at a time with the one that is being written"
    sentence = f"checkpoints: {needed}, {free / 1e9:.2f} GB free on the disk"
    if most * size > free:
        remedy = make_fit((free / most - networks_bytes) / memory_bytes * capacity)
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


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that can be allocated on `device` now; for the CPU, what the machine and control groups leave available.

    On systems that do not say what is available, all the memory there is. `root` is where they say it.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        free = 1024 * int(_fields(root / "proc/meminfo")["MemAvailable:"])
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)  # of ulimit -v
    if limit != resource.RLIM_INFINITY:
        used = int((root / "proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        free = min(free, limit - used)
    for place, version in _control_groups("memory", root):
        limit, usage, cache = MEMORY_FILES[version]
        with contextlib.suppress(OSError, KeyError, ValueError):  # no such group, or no limit ("max")
            used = int((place / usage).read_text()) - int(_fields(place / "memory.stat")[cache])
            free = min(free, int((place / limit).read_text()) - used)
    return free


def _control_groups(controller: str, root: Path) -> Iterator[tuple[Path, int]]:
    """The directories, perhaps, of the groups that limit what this process gets of what the `controller` controls.

    With each comes the version. A batch system limits its jobs far below the root, and any group may be limited. In a
    container there is but the root, whatever the path.
    """
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top, version = (root / "sys/fs/cgroup" / controller, 1) if controllers else (root / "sys/fs/cgroup", 2)
        steps = Path(path).relative_to("/").parts
        yield from ((top.joinpath(*steps[:depth]), version) for depth in range(len(steps) + 1))


def _fields(path: Path) -> dict[str, str]:
    """The first two words of every line of a file, name and value."""
    return dict(line.split()[:2] for line in path.read_text().splitlines())


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


def count_cores(root: Path = Path("/")) -> int:
    """The cores that this process may use: no more than its quota of time, which containers have, is worth."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for place, version in _control_groups("cpu", root):
        with contextlib.suppress(OSError, ValueError):  # no such group, or no quota ("max")
            quota, period = map(int, " ".join((place / name).read_text() for name in QUOTA_FILES[version]).split())
            cores = min(cores, max(quota // period, 1)) if quota > 0 else cores
    return cores


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
    gpu = {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda} if device.type == "cuda" else {}
    return {"cpu": cpu, "cores": count_cores(), **gpu}


def _git(*arguments: str) -> str | None:
    """What git says about this program, or None where it says nothing."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
