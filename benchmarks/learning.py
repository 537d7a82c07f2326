"""What a recipe learns: recipes x games x seeds through main.py, strict evaluations, curves and a table.

    python benchmarks/learning.py --recipes classic-uniform full --games breakout pong --seeds 0 1 2 \\
        --steps 800_000 --every 50_000 --out runs/ [--at 400_000] [--until breakout=40] [--jobs N] [--CONSTANT=value]

Every run is `python main.py ...` in OUT/RECIPE-GAME-SEED, beside learning.json (its constants, machine and clock) and
log.txt (what it said). The same command once more skips what is finished and starts the rest again; Ctrl-C stops the
runs too, and with more --steps finished ones go on. After each run the models of --at and of the last step play 30 more
games (strict_NNN.json), and the curves, the picture, the table and summary.csv of all runs in OUT are brought up to
date.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from learning_report import report, rewards, write
from recipes import RECIPES

import main
import utils_config
import utils_machine
from utils_drl import Agent
from utils_env import AtariEnv, normalize_game
from utils_files import model_name
from utils_record import FREE

ROOT = Path(main.__file__).parent
STRICT_GAMES = 30
STRICT_EPS = (0.05, 0.01)  # the paper's, which counts, and one nearer to what others publish
MODELS = "./models"  # in the directory of a run, whatever main.py says
LOOK = 1.0  # seconds between looks at the runs
OWN = ("GAME", "SEED", "MAX_STEPS", "EVALUATE_FREQ", "SAVE_PREFIX")  # constants that are this script's to set


@dataclass
class Run:
    """One run of main.py and its learning.json."""

    directory: Path
    record: dict
    arguments: list[str]  # of main.py, from the next start on
    child: subprocess.Popen | None = None

    def number(self, steps: int) -> int:
        """The evaluation at `steps`."""
        return steps // self.record["constants"]["EVALUATE_FREQ"]

    @property
    def finished(self) -> bool:
        """Whether its last evaluation has been seen."""
        return str(self.number(self.record["constants"]["MAX_STEPS"])) in self.record["reached"]


def bench() -> int:
    """Train, evaluate and report what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    of_recipes = {"nargs": "+", "choices": RECIPES, "default": ["shipped"], "metavar": "RECIPE"}
    parser.add_argument(
        "--recipes", **of_recipes, help="names in recipes.py (default shipped: the constants of main.py)"
    )
    parser.add_argument("--games", nargs="+", default=["breakout"], metavar="GAME", help="(default breakout)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="(default 0)")
    parser.add_argument("--steps", type=int, default=800_000, help="length of each run (default 800,000)")
    parser.add_argument("--every", type=int, default=50_000, help="steps between evaluations (default 50,000)")
    parser.add_argument("--at", nargs="+", type=int, default=[], help="steps whose models are evaluated strictly too")
    parser.add_argument("--until", nargs="+", type=goal, default=[], metavar="GAME=SCORE", help="when was it reached?")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; above 1 with one thread each")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the runs")
    parser.add_argument(
        "--summary", type=Path, metavar="FILE", help="rows to bring up to date (default DIR/summary.csv)"
    )
    asked, constants = parser.parse_known_args()
    try:
        runs = open_table(asked, constants)
    except (utils_config.ConfigError, ValueError) as error:
        parser.error(str(error))

    def done(run: Run) -> None:
        for steps in sorted({*asked.at, asked.steps}):
            evaluate(run, steps)
        report(asked.out, dict(asked.until), asked.summary or asked.out / "summary.csv")

    try:
        failed = train(runs, asked.jobs, done)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    if failed < len(runs):
        print((asked.out / "table.md").read_text(), end="")
    return int(failed > 0)


def goal(text: str) -> tuple[str, float]:
    """The game and the score of, for example, breakout=40."""
    game, score = text.split("=")
    return normalize_game(game), float(score)


def open_table(asked: argparse.Namespace, constants: list[str]) -> list[Run]:
    """The runs that the command line asks for. Raises ConfigError or ValueError for what cannot work."""
    for name, value in resolve(constants).items():
        if name in OWN and value != getattr(main, name):
            raise ValueError(f"{name} is set by --games, --seeds, --steps, --every and --out")
    if asked.steps % asked.every:
        raise ValueError(f"--steps {asked.steps} must be a multiple of --every {asked.every}")
    if wrong := [steps for steps in asked.at if steps % asked.every or not 0 <= steps <= asked.steps]:
        raise ValueError(f"--at {wrong[0]}: there is an evaluation every {asked.every} steps up to {asked.steps}")
    if len(dict(asked.until)) < len(asked.until):
        raise ValueError("--until: one score per game, please")
    if asked.jobs > 1:
        constants = ["--THREADS=1", *constants]
    labels = {recipe: label(recipe, constants) for recipe in asked.recipes}
    runs = []
    seeds, games, recipes = map(dict.fromkeys, (asked.seeds, map(normalize_game, asked.games), asked.recipes))  # once
    for seed in seeds:  # outermost: every question gets its first answer before any gets its second
        for game in games:
            for recipe in recipes:
                own = {"GAME": game, "SEED": seed, "MAX_STEPS": asked.steps, "EVALUATE_FREQ": asked.every}
                own["SAVE_PREFIX"] = MODELS
                arguments = [*flags(RECIPES[recipe]), *constants, *flags(own)]
                runs.append(open_run(asked.out / f"{recipe}-{game}-{seed}", labels[recipe], arguments))
    return runs


def label(recipe: str, constants: list[str]) -> str:
    """What a run of `recipe` with these `constants` besides is called in tables, or it would take the place of another.

    Those of them that may not change within a run belong to its name.
    """
    plain, changed = resolve(flags(RECIPES[recipe])), resolve([*flags(RECIPES[recipe]), *constants])
    others = (name for name in plain if name not in FREE and changed[name] != plain[name])
    return " ".join([recipe, *(f"{name}={changed[name]}" for name in others)])


def flags(constants: dict) -> list[str]:
    """The arguments of main.py that set `constants`."""
    return [f"--{name}={value}" for name, value in constants.items()]


def resolve(arguments: list[str]) -> dict:
    """All constants of main.py under `arguments`. Raises ConfigError for those that cannot work."""
    module = dict(vars(main))
    utils_config.override(module, arguments)
    return utils_config.check(module)


def open_run(directory: Path, recipe: str, arguments: list[str]) -> Run:
    """The run of `arguments`, as it stands or new. Raises ValueError, with a sentence, if another is in its place.

    `recipe` is what tables call it. Only THREADS and MAX_STEPS may be others than before, and the record tells those of
    the last start.
    """
    constants = resolve(arguments)
    if (directory / "learning.json").exists():
        record = json.loads((directory / "learning.json").read_text())
        for name, value in record["constants"].items():
            if name not in ("THREADS", "MAX_STEPS") and constants.get(name) != value:
                raise ValueError(f"{directory} has {name} {value}, not {constants.get(name)}; choose another --out")
        record["constants"]["MAX_STEPS"], record["recipe"] = constants["MAX_STEPS"], recipe
        return Run(directory, record, arguments)
    if directory.exists():
        raise ValueError(f"{directory} is there already, without a learning.json; choose another --out")
    about = utils_machine.describe_hardware(utils_machine.choose_device(constants["DEVICE"]))
    record = {
        "recipe": recipe,
        "game": constants["GAME"],
        "seed": constants["SEED"],
        "constants": constants,
        "hardware": ", ".join(filter(None, (about["cpu"], f"{about['cores']} cores", about.get("gpu")))),
        "reached": {},  # seconds of work after which each evaluation was there
        "clock": 0.0,  # seconds of work, work lost by an interruption included: so far,
        "before": 0.0,  # and when main.py was last started,
        "started": 0.0,  # which was at this time
    }
    return Run(directory, record, arguments)


def train(runs: list[Run], jobs: int, done: Callable[[Run], None]) -> int:
    """Bring all runs to their end, `jobs` at a time, calling `done(run)` after each; return how many failed."""
    waiting, working, failed = list(runs), [], 0
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                run = waiting.pop(0)
                look(run)  # main.py may have gone on alone if this script was killed
                if run.finished:
                    done(run)
                else:
                    working.append(start(run))
            time.sleep(LOOK)
            for run in list(working):
                over = run.child.poll() is not None  # asked first: then nothing comes after the look
                look(run)
                if over:
                    working.remove(run)
                    if run.finished and run.child.returncode == 0:
                        done(run)
                    else:
                        failed += 1
                        words = (run.directory / "log.txt").read_text().splitlines() or ["it said nothing"]
                        print(f"{run.directory.name} failed ({run.child.returncode}): {words[-1]}", file=sys.stderr)
    finally:  # main.py writes what it needs to go on
        for run in working:
            run.child.send_signal(signal.SIGTERM)
        for run in working:
            run.child.wait()
            look(run)
    return failed


def start(run: Run) -> Run:
    """Start main.py, for the first time or again, in a session of its own, so that a Ctrl-C reaches it only once."""
    run.directory.mkdir(parents=True, exist_ok=True)
    constants = resolve(run.arguments)
    run.record |= {"constants": constants, "before": run.record["clock"], "started": time.time()}
    write(run.directory / "learning.json", json.dumps(run.record, indent=1))
    with open(run.directory / "log.txt", "a") as log:
        run.child = subprocess.Popen(
            [sys.executable, ROOT / "main.py", *run.arguments],
            cwd=run.directory,
            stdout=log,
            stderr=log,
            env=os.environ | {"TQDM_MININTERVAL": "10"},
            start_new_session=True,
        )
    return run


def look(run: Run) -> None:
    """Note new evaluations and the time. A kill of this script costs the clock no more than one look."""
    record = run.record
    for number, step, score in rewards(run.directory):
        model = run.directory / MODELS / model_name(number)
        if str(number) not in record["reached"] and model.exists():
            seconds = record["before"] + model.stat().st_mtime - record["started"]
            record["reached"][str(number)] = round(seconds, 1)
            record["clock"] = max(record["clock"], seconds)
            print(f"{run.directory.name}: {score} at step {step:,}, {seconds / 60:.1f} minutes", file=sys.stderr)
    if run.child:
        record["clock"] = record["before"] + time.time() - record["started"]
    if record["started"]:
        write(run.directory / "learning.json", json.dumps(record, indent=1))


def evaluate(run: Run, steps: int) -> None:
    """Let the model of `steps` play STRICT_GAMES games of at most five minutes at each of STRICT_EPS, once for all."""
    constants, number = run.record["constants"], run.number(steps)
    result = run.directory / f"strict_{number:03d}.json"
    if result.exists():
        return
    device = utils_machine.choose_device(constants["DEVICE"])
    dtype = utils_machine.prepare(device, constants["PRECISION"], constants["THREADS"])
    model = run.directory / MODELS / model_name(number)
    options = {"graphs": constants["CUDA_GRAPHS"]}
    agent, about = Agent.from_model(model, device, dtype=dtype, **options)
    options["num_threads"] = utils_machine.choose_emulator_threads(device)
    env = AtariEnv(num_envs=1, device=device, **options, **about["rules"])
    seed = [constants["SEED"], steps, 4]  # training ends its seeds in 0 to 3
    scores = {str(epsilon): env.evaluate(agent, STRICT_GAMES, epsilon, seed).tolist() for epsilon in STRICT_EPS}
    write(result, json.dumps({"steps": steps, "number": number, "seed": seed, "scores": scores}))
    means = ", ".join(f"{np.mean(values):.1f} at epsilon {epsilon}" for epsilon, values in scores.items())
    print(f"{run.directory.name}: strict, step {steps:,}: {means}", file=sys.stderr)


def leave(*_) -> None:
    """Stop the runs, as Ctrl-C does. Hangups come in pairs."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup lets a lost terminal be
            signal.signal(number, leave)
    with contextlib.redirect_stderr(utils_config.Audience(sys.stderr)):  # the terminal may be gone
        sys.exit(bench())
