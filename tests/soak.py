"""Let a run train for a long time, with evaluations and checkpoints every few seconds, and watch what it takes.

    python tests/soak.py [--minutes 45] [--every 1] [--CONSTANT=value ...]

Every `--every` minutes a line: step, resident memory, open files, threads, and since the line before processor seconds
per 1,000 steps and steps per second, which other work on the machine disturbs. The exit status says whether memory and
open files stayed flat: in the last third of the time at most GROWTH above the second. Linux.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

MAIN = Path(__file__).resolve().parent.parent / "main.py"
SMALL = {
    "MAX_STEPS": 100_000_000,
    "PRIORITIZED": True,
    "DOUBLE_DQN": True,
    "N_STEP": 3,
    "WARM_STEPS": 2_000,
    "MEM_SIZE": 10_000,
    "EVALUATE_FREQ": 2_000,
    "EVAL_EPISODES": 4,
    "CHECKPOINT_FREQ": 4_000,
    "THREADS": 1,
}
GROWTH = 1.02
CLOCK = os.sysconf("SC_CLK_TCK")


def look(process: subprocess.Popen, log: Path) -> tuple[int, float, int, int, float]:
    """Step, resident megabytes, open files, threads and processor seconds of the run now."""
    directory = Path("/proc") / str(process.pid)
    status = dict(re.findall(r"(\w+):\s+(\d+)", (directory / "status").read_text()))
    fields = (directory / "stat").read_text().rsplit(")", 1)[1].split()
    seconds = (int(fields[11]) + int(fields[12])) / CLOCK
    steps = re.findall(r"^step ([\d,]+)", log.read_text(), re.MULTILINE)
    step = int(steps[-1].replace(",", "")) if steps else 0
    return step, int(status["VmRSS"]) / 1024, len(list((directory / "fd").iterdir())), int(status["Threads"]), seconds


def main() -> int:
    """Train, look, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--every", type=float, default=1)
    asked, constants = parser.parse_known_args()
    arguments = [*(f"--{name}={value}" for name, value in SMALL.items()), *constants]
    with tempfile.TemporaryDirectory() as place, open(Path(place) / "log.txt", "w") as file:
        log = Path(file.name)
        process = subprocess.Popen([sys.executable, str(MAIN), *arguments], cwd=place, stderr=file)
        try:
            end, before, held = time.monotonic() + 60 * asked.minutes, None, []
            print("minute     step    MB  files  threads  CPU s per 1,000 steps  steps/s", flush=True)
            start = then = time.monotonic()
            while time.monotonic() < end:
                time.sleep(60 * asked.every)
                if process.poll() is not None:
                    print(log.read_text(), f"the run ended with status {process.returncode}", sep="\n")
                    return 1
                now, (step, memory, files, threads, seconds) = time.monotonic(), look(process, log)
                done = step - before[0] if before else 0
                if done:
                    rates = f"{1000 * (seconds - before[1]) / done:10.2f} {done / (now - then):21.0f}"
                    print(
                        f"{(now - start) / 60:6.0f} {step:8,d} {memory:5.0f} {files:6d} {threads:8d} {rates}",
                        flush=True,
                    )
                before, then = (step, seconds), now
                held.append((memory, files))
            process.send_signal(signal.SIGTERM)
            third = len(held) // 3
            second, last = (np.mean(part, axis=0) for part in (held[third : 2 * third], held[-third:]))
            flat = bool((last <= GROWTH * second).all())
            print("flat" if flat else f"not flat: {second} and then {last} MB and files")
            return int(process.wait() != 128 + signal.SIGTERM or not flat)
        finally:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())
