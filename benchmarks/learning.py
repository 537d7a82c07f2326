"""What a recipe learns: recipes x games x seeds through main.py, with curves, strict evaluations and a table.

    python benchmarks/learning.py --recipes classic-uniform full --games breakout pong --seeds 0 1 2 \\
        --steps 800_000 --every 50_000 --out runs/ [--at 400_000] [--until breakout=40] [--jobs N] [--CONSTANT=value ...]

Every run is `python main.py ...` in OUT/RECIPE-GAME-SEED, beside run.json (its constants, machine and clock) and log.txt
(what it said). The same command once more skips what is finished and starts the rest again where it stopped; Ctrl-C
stops the runs too. After each run, the models of --at and of the last step play 30 more games, and OUT gets curves.csv,
curves.png and table.md of all runs it holds; the rows of results/summary.csv follow.
"""

import argparse
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import main
import utils_config
from throughput import machine
from utils_drl import Agent
from utils_env import AtariEnv, normalize_game

# The classic values spelled out, so that they stay classic when the defaults of main.py change.
CLASSIC = {
    "STACK_SIZE": 4,
    "FRAME_SKIP": 4,
    "GAMMA": 0.99,
    "EPS_START": 1.0,
    "EPS_END": 0.1,
    "EPS_DECAY": 1_000_000,
    "BATCH_SIZE": 32,
    "POLICY_UPDATE": 4,
    "TARGET_UPDATE": 10_000,
    "WARM_STEPS": 50_000,
    "MEM_SIZE": 100_000,
    "LEARNING_RATE": 6.25e-5,
    "ADAM_EPS": 1.5e-4,
    "PRIORITIZED": False,
    "ALPHA": 0.5,
    "BETA_START": 0.4,
    "DOUBLE_DQN": False,
    "DUELING": False,
    "N_STEP": 1,
    "QUANTILES": 1,
}
PRIORITIZED = CLASSIC | {"PRIORITIZED": True}
FAST = CLASSIC | {"WARM_STEPS": 20_000, "TARGET_UPDATE": 8_000, "EPS_END": 0.01, "EPS_DECAY": 250_000}
QUANTILES = {"QUANTILES": 64, "LEARNING_RATE": 1e-4}
FULL = FAST | QUANTILES | {"PRIORITIZED": True, "DOUBLE_DQN": True, "N_STEP": 3}

RECIPES = {  # name: the constants of main.py that it changes, and the question it is to answer
    "shipped": {},  # what do the defaults reach?
    "classic-uniform": CLASSIC,  # at least 19.0 on Breakout at 800k steps?
    "classic-prioritized": PRIORITIZED,  # never below uniform, per step and per minute?
    "prioritized-alpha-0.6": PRIORITIZED | {"ALPHA": 0.6},  # stronger priorities, as Schaul et al. 2016?
    "prioritized-beta-0.5": PRIORITIZED | {"BETA_START": 0.5},  # more correction from the start?
    "prioritized-beta-1": PRIORITIZED | {"BETA_START": 1.0},  # full correction all along, nothing annealed?
    "prioritized-lr-1e-4": PRIORITIZED | {"LEARNING_RATE": 1e-4},  # is 6.25e-5 too careful ...
    "prioritized-lr-2.5e-4": PRIORITIZED | {"LEARNING_RATE": 2.5e-4},  # ... even a quarter of what would do?
    "uniform-lr-1e-4": CLASSIC | {"LEARNING_RATE": 1e-4},  # has uniform replay its own best rate ...
    "uniform-lr-2.5e-4": CLASSIC | {"LEARNING_RATE": 2.5e-4},  # ... four times the prioritized one?
    "fast": FAST,  # what do warm-up, target period and epsilon bring a short run by themselves?
    "fast-prioritized": FAST | {"PRIORITIZED": True},  # what do priorities add ...
    "double": FAST | {"DOUBLE_DQN": True},  # ... Double DQN ...
    "n-step-3": FAST | {"N_STEP": 3},  # ... returns over three steps ...
    "dueling": FAST | {"DUELING": True},  # ... the dueling head ...
    "quantiles": FAST | QUANTILES,  # ... and quantiles, each alone?
    "full": FULL,  # all together, but for the dueling head
    "full-dueling": FULL | {"DUELING": True},  # does the dueling head still add something ...
    "full-uniform": FULL | {"PRIORITIZED": False},  # ... and what is lost without priorities ...
    "full-single": FULL | {"DOUBLE_DQN": False},  # ... without Double DQN ...
    "full-one-step": FULL | {"N_STEP": 1},  # ... without the longer returns ...
    "full-classic-loss": FULL | {"QUANTILES": 1, "LEARNING_RATE": 6.25e-5},  # ... without quantiles?
    "full-lr-6.25e-5": FULL | {"LEARNING_RATE": 6.25e-5},  # which rate do the quantiles want?
    "full-lr-2.5e-4": FULL | {"LEARNING_RATE": 2.5e-4},
    "full-target-2k": FULL | {"TARGET_UPDATE": 2_000},  # does a fresher target pay in a short run?
    "full-epsilon-100k": FULL | {"EPS_DECAY": 100_000},  # does less exploration?
    "full-update-1": FULL | {"POLICY_UPDATE": 1},  # do more updates pay, per step or per minute ...
    "full-update-2": FULL | {"POLICY_UPDATE": 2},
    "full-update-8": FULL | {"POLICY_UPDATE": 8},  # ... or fewer?
    "full-batch-64": FULL | {"BATCH_SIZE": 64},  # do larger batches pay ...
    "full-batch-128-update-16": FULL | {"BATCH_SIZE": 128, "POLICY_UPDATE": 16},  # ... as fewer updates on as much data?
    "full-batch-512-update-64": FULL | {"BATCH_SIZE": 512, "POLICY_UPDATE": 64},
}

HUMAN = {  # scores of random play and of the human tester (Mnih et al. 2015, Wang et al. 2016)
    "asterix": (210.0, 8503.3),
    "breakout": (1.7, 30.5),
    "pong": (-20.7, 14.6),
    "qbert": (163.9, 13455.0),
    "seaquest": (68.4, 42054.7),
    "space_invaders": (148.0, 1668.7),
}

STRICT_GAMES = 30
STRICT_EPS = (0.05, 0.01)  # the paper's, which counts, and one nearer to what others publish
LOOK = 1.0  # seconds between looks at the runs
TABLE = ("GAME", "SEED", "MAX_STEPS", "EVALUATE_FREQ", "SAVE_PREFIX")  # constants that are this script's to set
COLUMNS = ("recipe", "game", "steps", "seeds", "mean", "low", "high", "minutes", "hardware")  # of summary.csv


@dataclass
class Run:
    """One run of main.py and its run.json."""

    directory: Path
    record: dict
    child: subprocess.Popen | None = None

    def number(self, steps: int) -> int:
        """The evaluation at `steps`."""
        return -(-steps // self.record["constants"]["EVALUATE_FREQ"])

    @property
    def finished(self) -> bool:
        """Whether its last evaluation has been seen."""
        return str(self.number(self.record["constants"]["MAX_STEPS"])) in self.record["reached"]


def bench() -> int:
    """Train, evaluate and report what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["shipped"], metavar="RECIPE")
    parser.add_argument("--games", nargs="+", default=["breakout"], metavar="GAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--steps", type=int, default=800_000, help="length of each run")
    parser.add_argument("--every", type=int, default=50_000, help="steps between evaluations")
    parser.add_argument("--at", nargs="+", type=int, default=[], help="steps whose models are evaluated strictly too")
    parser.add_argument("--until", nargs="+", default=[], metavar="GAME=SCORE", help="when was this score reached?")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; above 1 with one thread each")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the runs")
    parser.add_argument("--summary", type=Path, default=ROOT / "results" / "summary.csv", metavar="FILE")
    asked, constants = parser.parse_known_args()
    if wrong := [steps for steps in asked.at if steps % asked.every or not 0 <= steps <= asked.steps]:
        parser.error(f"--at {wrong[0]}: there is an evaluation every {asked.every} steps up to {asked.steps}")
    runs, failed = [], 0
    try:
        given = resolve(constants)
        if own := [name for name in TABLE if given[name] != getattr(main, name)]:
            parser.error(f"{own[0]} is set by --games, --seeds, --steps, --every and --out")
        until = {normalize_game(game): float(score) for game, score in (pair.split("=") for pair in asked.until)}
        constants += ["--THREADS=1"] * (asked.jobs > 1)
        table = [(recipe, game, seed) for seed in asked.seeds for game in asked.games for recipe in asked.recipes]
        for recipe, game, seed in table:
            own = {"GAME": game, "SEED": seed, "MAX_STEPS": asked.steps, "EVALUATE_FREQ": asked.every}
            arguments = [*flags(RECIPES[recipe]), *constants, *flags(own)]
            try:
                runs.append(open_run(asked.out, recipe, arguments))
            except FileExistsError as error:
                failed += report_failure(str(error))
    except (utils_config.ConfigError, ValueError) as error:
        parser.error(str(error))

    def done(run: Run) -> None:
        for steps in sorted({*asked.at, asked.steps}):
            evaluate(run, steps)
        report(asked.out, until, asked.summary)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        failed += train(runs, asked.jobs, done)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    if (asked.out / "table.md").exists():
        print((asked.out / "table.md").read_text(), end="")
    return int(failed > 0)


def flags(constants: dict) -> list[str]:
    """The arguments of main.py that set `constants`."""
    return [f"--{name}={value}" for name, value in constants.items()]


def resolve(arguments: list[str]) -> dict:
    """All constants of main.py under `arguments`. Raises ConfigError for those that cannot work."""
    module = dict(vars(main))
    utils_config.override(module, arguments)
    utils_config.check(module)
    return {name: module[name] for name in utils_config.constants(module)}


def open_run(out: Path, recipe: str, arguments: list[str]) -> Run:
    """The run of `arguments`, as it stands or new. Raises FileExistsError, with a sentence, if another is in its place.

    A run keeps the arguments it began with; only THREADS, which changes no result, may differ.
    """
    constants = resolve(arguments)
    game = normalize_game(constants["GAME"])
    directory = out / f"{recipe}-{game}-{constants['SEED']}"
    if (directory / "run.json").exists():
        record = json.loads((directory / "run.json").read_text())
        for name, value in record["constants"].items():
            if name != "THREADS" and constants.get(name) != value:
                raise FileExistsError(
                    f"{directory} holds a run with {name} {value}, not {constants.get(name)}; choose another --out"
                )
        return Run(directory, record)
    if directory.exists():
        raise FileExistsError(f"{directory} is there already, and without a run.json; choose another --out")
    device = utils_config.choose_device(constants["DEVICE"])
    about = machine(device)
    record = {
        "recipe": recipe,
        "game": game,
        "seed": constants["SEED"],
        "arguments": arguments,
        "constants": constants,
        "hardware": ", ".join(filter(None, (about["cpu"], f"{about['cores']} cores", about.get("gpu")))),
        "reached": {},  # seconds of work after which each evaluation was there
        "clock": 0.0,  # seconds of work so far, lost work included,
        "before": 0.0,  # and when main.py was started last,
        "started": 0.0,  # which was at this time
    }
    return Run(directory, record)


def train(runs: list[Run], jobs: int, done) -> int:
    """Bring all runs to their end, `jobs` at a time, calling `done(run)` after each; return how many failed."""
    waiting, working, failed = list(runs), [], 0
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                run = waiting.pop(0)
                look(run)  # main.py may have gone on alone if this script was killed
                if run.finished:
                    print(f"{run.directory.name}: finished", file=sys.stderr)
                    done(run)
                else:
                    working.append(start(run))
            time.sleep(LOOK)
            for run in list(working):
                over = run.child.poll() is not None  # asked first: then nothing comes after the look
                look(run)
                if over:
                    working.remove(run)
                    if run.child.returncode or not run.finished:
                        failed += report_failure(f"{run.directory} failed ({run.child.returncode}): {last_line(run)}")
                    else:
                        done(run)
    finally:  # main.py writes what it needs to go on
        for run in working:
            run.child.send_signal(signal.SIGINT)
        for run in working:
            run.child.wait()
            look(run)
    return failed


def start(run: Run) -> Run:
    """Start main.py, for the first time or again, in a session of its own, so that a Ctrl-C reaches it only once."""
    run.directory.mkdir(parents=True, exist_ok=True)
    run.record |= {"before": run.record["clock"], "started": time.time()}
    write(run.directory / "run.json", json.dumps(run.record, indent=1))
    with open(run.directory / "log.txt", "a") as log:
        run.child = subprocess.Popen(
            [sys.executable, ROOT / "main.py", *run.record["arguments"]],
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
        model = run.directory / "models" / f"model_{number:03d}"
        if str(number) not in record["reached"] and model.exists():
            seconds = record["before"] + model.stat().st_mtime - record["started"]
            record["reached"][str(number)] = round(seconds, 1)
            record["clock"] = max(record["clock"], seconds)
            print(f"{run.directory.name}: {score} at step {step:,}, {seconds / 60:.1f} minutes", file=sys.stderr)
    if run.child:
        record["clock"] = record["before"] + time.time() - record["started"]
        write(run.directory / "run.json", json.dumps(record, indent=1))


def rewards(directory: Path) -> list[tuple[int, int, float]]:
    """Number, step and score of every evaluation in rewards.txt."""
    try:
        rows = [line.split() for line in (directory / "rewards.txt").read_text().splitlines()]
    except FileNotFoundError:
        return []
    return [(int(number), int(step), float(score)) for number, step, score in rows]


def last_line(run: Run) -> str:
    """The last thing that main.py said."""
    lines = (run.directory / "log.txt").read_text().replace("\r", "\n").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "without a word")


def report_failure(sentence: str) -> int:
    """Say it, and count it."""
    print(sentence, file=sys.stderr)
    return 1


def write(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".tmp").write_text(text)
    path.with_name(path.name + ".tmp").replace(path)


def evaluate(run: Run, steps: int) -> None:
    """Let the model of `steps` play STRICT_GAMES whole games of at most five minutes at each STRICT_EPS, once for all."""
    constants, number = run.record["constants"], run.number(steps)
    result = run.directory / f"strict_{number:03d}.json"
    if result.exists():
        return
    if constants["THREADS"]:
        torch.set_num_threads(constants["THREADS"])
    device = utils_config.choose_device(constants["DEVICE"])
    env = AtariEnv(run.record["game"], 1, device, stack_size=constants["STACK_SIZE"], frame_skip=constants["FRAME_SKIP"])
    model = run.directory / "models" / f"model_{number:03d}"
    shape = torch.load(model, weights_only=True)["shape"]
    agent = Agent(device=device, dtype=utils_config.choose_dtype(constants["PRECISION"], device), **shape)
    agent.load(model)
    seed = [constants["SEED"], steps, 2]  # training ends its seeds in 0 and 1
    scores = {str(epsilon): env.evaluate(agent, STRICT_GAMES, epsilon, seed).tolist() for epsilon in STRICT_EPS}
    write(result, json.dumps({"steps": steps, "seed": seed, "scores": scores}, indent=1))
    means = ", ".join(f"{np.mean(values):.1f} at epsilon {epsilon}" for epsilon, values in scores.items())
    print(f"{run.directory.name}: {means}, strictly, of the model of step {steps:,}", file=sys.stderr)


def report(out: Path, until: dict[str, float], summary: Path) -> None:
    """Write curves.csv, curves.png and table.md of all runs in `out`, and merge their rows into `summary`."""
    runs = [Run(path.parent, json.loads(path.read_text())) for path in sorted(out.glob("*/run.json"))]
    groups = defaultdict(list)  # the curves of all seeds: rows of number, step, score, minutes
    lines = []
    strict = defaultdict(list)
    for run in runs:
        reached = run.record["reached"]
        curve = [(*row, reached[str(row[0])] / 60) for row in rewards(run.directory) if str(row[0]) in reached]
        recipe, game = run.record["recipe"], run.record["game"]
        groups[game, recipe].append(curve)
        lines += [(recipe, game, run.record["seed"], *row[:3], round(row[3], 2)) for row in curve]
        for path in run.directory.glob("strict_*.json"):
            result = json.loads(path.read_text())
            strict[game, result["steps"], recipe].append((run, result["scores"]))
    write(out / "curves.csv", as_csv(("recipe", "game", "seed", "number", "step", "score", "minutes"), lines))
    draw(out / "curves.png", groups)

    table = ["| game | steps | recipe | seeds | mean | 95% | median | human | at 0.01 | minutes | until | steps | minutes |"]
    table += ["|---" * table[0].count(" | ") + "|---|"]
    rows = {}
    for (game, steps, recipe), results in sorted(strict.items()):
        scores, others = (np.array([score[str(epsilon)] for _, score in results]) for epsilon in STRICT_EPS)
        low, high = interval(scores.mean(1) if len(scores) > 1 else scores[0])
        minutes = np.mean([run.record["reached"][str(run.number(steps))] for run, _ in results]) / 60
        random, human = HUMAN.get(game, (np.nan, np.nan))
        target = until.get(game, np.inf)
        first = [when(curve, target) for curve in groups[game, recipe]]
        cells = (
            game,
            f"{steps:,}",
            recipe,
            len(scores),
            f"{scores.mean():.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{np.median(scores):.1f}",
            f"{(scores.mean() - random) / (human - random):.2f}",
            f"{others.mean():.1f}",
            f"{minutes:.1f}",
            *(f"{number:,.{places}f}" for number, places in zip((target, *np.median(first, 0)), (0, 0, 1), strict=True)),
        )
        table.append("| " + " | ".join(str(cell).replace("nan", "-").replace("inf", "-") for cell in cells) + " |")
        hardware = "; ".join(sorted({run.record["hardware"] for run, _ in results}))
        rows[recipe, game, str(steps)] = [len(scores), *np.round([scores.mean(), low, high, minutes], 1), hardware]
    write(out / "table.md", "\n".join(table) + "\n")
    merge(summary, rows)


def interval(values: np.ndarray) -> np.ndarray:
    """The bootstrap's 95% interval of the mean of `values`: of the seeds, or of one seed's games."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    return np.percentile(draws.mean(1), [2.5, 97.5])


def when(curve: list[tuple], target: float) -> tuple[float, float]:
    """Steps and minutes until an evaluation scored `target`, infinite if none did."""
    return next(((step, minutes) for _, step, score, minutes in curve if score >= target), (np.inf, np.inf))


def merge(path: Path, rows: dict[tuple, list]) -> None:
    """Put `rows` by recipe, game and steps into the CSV at `path`, in place of those it has for the same."""
    old = {}
    if path.exists():
        old = {tuple(row[:3]): row[3:] for row in csv.reader(path.open()) if row[0] != COLUMNS[0]}
    ordered = sorted((old | rows).items(), key=lambda row: (row[0][1], int(row[0][2]), row[0][0]))
    write(path, as_csv(COLUMNS, [(*key, *row) for key, row in ordered]))


def as_csv(header: tuple, rows: list[tuple]) -> str:
    """Text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def draw(path: Path, groups: dict[tuple[str, str], list]) -> None:
    """Mean and range over the seeds by steps and by minutes, a column per game; as far as all seeds have come."""
    games = sorted({game for game, _ in groups})
    figure = Figure(figsize=(6 * len(games), 8), layout="constrained")
    panels = figure.subplots(2, len(games), squeeze=False)
    for (game, recipe), curves in sorted(groups.items()):
        points = np.array([rows for rows in zip(*curves, strict=False)])  # [evaluations, seeds, 4]
        if not len(points):
            continue
        scores = points[:, :, 2]
        for panel, unit, values in zip(panels[:, games.index(game)], ("steps", "minutes"), (1, 3), strict=True):
            x = points[:, :, values].mean(1)
            (line,) = panel.plot(x, scores.mean(1), label=f"{recipe} ({len(curves)})")
            panel.fill_between(x, scores.min(1), scores.max(1), color=line.get_color(), alpha=0.2, linewidth=0)
            panel.set(xlabel=unit, ylabel="score", title=game)
    for panel in panels.flat:
        panel.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    sys.exit(bench())
