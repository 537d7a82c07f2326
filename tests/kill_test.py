"""Kill a run again and again, start it again with the same command, and compare it with one that was left alone.

    python tests/kill_test.py [--kills 50] [--stops 20] [--seed 0] [--CONSTANT=value ...]

`--kills` SIGKILLs come at random moments, half of them while a checkpoint is being written; each run that has reached
its end must have the same files, byte for byte, as the run left alone. `--stops` SIGINTs and as many SIGTERMs come at
random moments; each must end the run in time, with the usual status and a line that tells how to go on, and lose no
step. Runs are begun in new directories until the signals are used up.
"""

import argparse
import logging
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every restart
MAIN = Path(__file__).resolve().parent.parent / "main.py"
SMALL = {
    "SAVE_PREFIX": "./models",
    "PRIORITIZED": False,
    "MAX_STEPS": 20_000,
    "NUM_ENVS": 8,
    "WARM_STEPS": 200,
    "MEM_SIZE": 3_000,
    "TARGET_UPDATE": 100,
    "POLICY_UPDATE": 40,
    "BATCH_SIZE": 8,
    "EPS_DECAY": 10_000,
    "LEARNING_RATE": 1e-3,
    "EVALUATE_FREQ": 1_000,
    "EVAL_EPISODES": 2,
    "EVAL_EPS": 1.0,
    "PRECISION": "float32",
    "DEVICE": "cpu",
    "THREADS": 1,
    "CHECKPOINT_FREQ": 800,
}
IN_TIME = 30.0  # seconds from the signal to the end; 1 to 2 on an idle machine, but others may want it too


def start(directory: Path, constants: dict, **options) -> subprocess.Popen:
    """Start the run in `directory`, or go on with it."""
    arguments = [f"--{name}={value}" for name, value in constants.items()]
    return subprocess.Popen(
        [sys.executable, str(MAIN), *arguments], cwd=directory, stderr=subprocess.PIPE, text=True, **options
    )


def curves(directory: Path = Path()) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run in `directory`: steps and values of every curve."""
    reader = EventAccumulator(str(directory / "curves"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def results(directory: Path) -> dict[str, bytes | dict]:
    """What a run has written, and its curves as TensorBoard reads them, without what tells of interruptions or time."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    timeless = {tag: points for tag, points in curves(directory).items() if not tag.startswith("speed/")}
    own = re.compile(r"run\.json|run\.id|rewards\.png|checkpoint_.*|events\..*")
    written = {str(path.relative_to(directory)): path.read_bytes() for path in files if not own.fullmatch(path.name)}
    return {"curves": timeless, **written}


def finish(process: subprocess.Popen) -> None:
    """Wait for a run to reach its end."""
    _, errors = process.communicate()
    if process.returncode:
        raise AssertionError(f"status {process.returncode}: {errors}")


def wait_for(process: subprocess.Popen, condition) -> bool:
    """Until `condition()` holds; False if the run ends before."""
    while not condition():
        if process.poll() is not None:
            return False
        time.sleep(0.0005)
    return True


def resumed(directory: Path):
    """A condition: that the run there has begun or gone on once more since now."""
    record = directory / "run.json"

    def starts() -> int:
        return record.read_text().count('"command"') if record.exists() else 0

    before = starts()
    return lambda: starts() > before


def strike(process: subprocess.Popen, directory: Path, rng: random.Random) -> str | None:
    """SIGKILL at a random moment, or within a random write of a checkpoint; what was struck, None after the end."""
    has_begun = resumed(directory)

    def writing() -> bool:
        return any((directory / "models").glob("checkpoint_*.tmp"))

    moment = "any moment"
    if rng.random() < 0.1:  # while it is starting
        time.sleep(rng.uniform(0, 3))
    elif not wait_for(process, has_begun):
        return None
    elif rng.random() < 0.5:
        time.sleep(rng.uniform(0, 2.5))
    else:
        moment = "a checkpoint"
        for _ in range(rng.randint(1, 3)):
            if not (wait_for(process, lambda: not writing()) and wait_for(process, writing)):
                return None
        time.sleep(rng.uniform(0, 0.05))
    if process.poll() is not None:
        return None
    process.kill()
    process.communicate()
    return f"{moment}, mid-write" if writing() else moment


def kill_runs(place: Path, kills: int, constants: dict, seed: int = 0) -> dict[str, int]:
    """Kill runs `kills` times in all; how often what was struck. Raises AssertionError where a run is not the same."""
    rng = random.Random(seed)
    place.mkdir(parents=True, exist_ok=True)
    alone = place / "alone"
    alone.mkdir()
    finish(start(alone, constants))
    expected, struck, number = results(alone), {}, 0
    while sum(struck.values()) < kills:
        number += 1
        directory = place / f"killed_{number}"
        directory.mkdir()
        while sum(struck.values()) < kills:
            process = start(directory, constants)
            moment = strike(process, directory, rng)
            if moment is None:
                finish(process)
                break
            struck[moment] = struck.get(moment, 0) + 1
            print(f"{sum(struck.values())} kills, the last in {moment}", file=sys.stderr)
        else:
            finish(start(directory, constants))
        compare(expected, results(directory), directory)
    return {"runs": number, "files": len(expected), **struck}


def compare(expected: dict[str, bytes], found: dict[str, bytes], directory: Path) -> None:
    """Raise AssertionError where a file differs."""
    different = [name for name in expected | found if expected.get(name) != found.get(name)]
    if different:
        raise AssertionError(f"{directory}: not the same: {', '.join(different)}")


def stop_runs(place: Path, stops: int, constants: dict, seed: int = 0) -> dict[str, float]:
    """`stops` SIGINTs and as many SIGTERMs at random moments; the longest time to the end. Raises AssertionError."""
    rng = random.Random(seed)
    order = stops * [signal.SIGINT, signal.SIGTERM]
    rng.shuffle(order)
    slowest, number, directory = 0.0, 0, None
    while order:
        if directory is None:
            number, step = number + 1, 0
            directory = place / f"stopped_{number}"
            directory.mkdir(parents=True)
        process = start(directory, constants)
        if not wait_for(process, resumed(directory)):
            raise AssertionError(process.communicate()[1])
        time.sleep(rng.uniform(0.1, 2.5))
        if process.poll() is not None:
            finish(process)
            directory = None
            continue
        begin = time.monotonic()
        process.send_signal(order[-1])
        _, errors = process.communicate()
        took = time.monotonic() - begin
        if step and f"going on at step {step:,} from" not in errors:
            raise AssertionError(f"stopped at {step}, and then: {errors}")
        if process.returncode == 0 and took < IN_TIME:  # it had come to its end
            directory = None
            continue
        number_of = order.pop()
        told = re.search(r"stopped .* step ?([\d,]*) by .* with: python .*main\.py", errors)
        if process.returncode != 128 + number_of or not told or took > IN_TIME:
            raise AssertionError(f"{number_of!r}: status {process.returncode} after {took:.1f} s: {errors}")
        stopped_at = int(told[1].replace(",", "") or 0)
        if stopped_at < step or list(directory.rglob("*.tmp")):
            raise AssertionError(f"stopped at {stopped_at} after {step}, {list(directory.rglob('*.tmp'))}")
        if stopped_at and not (directory / "models" / f"checkpoint_{stopped_at:010d}").exists():
            raise AssertionError(f"no checkpoint of step {stopped_at}")
        step, slowest = stopped_at, max(slowest, took)
        print(f"{len(order)} stops left, the last at step {step} took {took:.2f} s", file=sys.stderr)
    if directory is not None:
        finish(start(directory, constants))
        rows = [row.split()[:2] for row in (directory / "rewards.txt").read_text().splitlines()]
        every, last = constants["EVALUATE_FREQ"], constants["MAX_STEPS"]
        if rows != [[str(n), str(n * every)] for n in range(last // every + 1)]:
            raise AssertionError(f"rows {rows}")
    return {"runs": number, "slowest": slowest}


def main() -> None:
    """Read the arguments, do the tests, say what was found."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what runs in the background ignore it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stops", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    arguments, rest = parser.parse_known_args()
    given = dict(argument.removeprefix("--").split("=", 1) for argument in rest)
    numbers = {name: int(given[name]) for name in ("MAX_STEPS", "EVALUATE_FREQ") if name in given}  # read here
    constants = SMALL | given | numbers
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        if arguments.kills:
            print("kills:", kill_runs(Path(place), arguments.kills, constants, arguments.seed))
        if arguments.stops:
            print("stops:", stop_runs(Path(place), arguments.stops, constants, arguments.seed))
    print(f"all is well, after {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
