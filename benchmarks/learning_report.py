"""What the runs of learning.py have shown: evaluations as CSV, a picture of the curves, a table, the summary's rows."""

import csv
import io
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

HUMAN = {  # scores of random play and of the human tester (Mnih et al. 2015, Wang et al. 2016)
    "asterix": (210.0, 8503.3),
    "breakout": (1.7, 30.5),
    "pong": (-20.7, 14.6),
    "qbert": (163.9, 13455.0),
    "seaquest": (68.4, 42054.7),
    "space_invaders": (148.0, 1668.7),
}
CURVE = ("recipe", "game", "seed", "number", "step", "score", "minutes")
SUMMARY = ("recipe", "game", "steps", "seeds", "mean", "low", "high", "minutes", "hardware")
TABLE = ("game", "steps", "recipe", "seeds", "mean", "95%", "median", "human = 1", "mean at 0.01", "minutes")


def report(out: Path, until: dict[str, float], summary: Path) -> None:
    """Write curves.csv, curves.png and table.md of all runs in `out`, and merge their rows into `summary`.

    `until` gives for some games the score of which the table says when it was first reached.
    """
    lines, curves, strict = [], defaultdict(list), defaultdict(list)
    for path in sorted(out.glob("*/learning.json")):
        run = json.loads(path.read_text())
        recipe, game, reached = run["recipe"], run["game"], run["reached"]
        curve = [(*row, reached[str(row[0])] / 60) for row in rewards(path.parent) if str(row[0]) in reached]
        lines += [(recipe, game, run["seed"], *row[:3], round(row[3], 2)) for row in curve]
        curves[game, recipe].append(curve)
        for played in path.parent.glob("strict_*.json"):
            result = json.loads(played.read_text())
            minutes = reached[str(result["number"])] / 60
            strict[game, result["steps"], recipe].append((*result["scores"].values(), minutes, run["hardware"]))
    write(out / "curves.csv", as_csv(CURVE, lines))
    draw(out / "curves.png", curves)

    table, rows = [[*TABLE, "until", "steps", "minutes"]], {}
    for (game, steps, recipe), results in sorted(strict.items()):
        scores, greedier, minutes, hardware = zip(*results, strict=True)
        scores, minutes = np.array(scores), np.mean(minutes)  # [seeds, games]
        mean, (low, high) = scores.mean(), interval(scores)
        random, human = HUMAN.get(game, (np.nan, np.nan))
        cells = [game, f"{steps:,}", recipe, len(scores), f"{mean:.1f}", f"{low:.1f} to {high:.1f}"]
        cells += [f"{np.median(scores):.1f}", f"{(mean - random) / (human - random):.2f}"]
        cells += [f"{np.mean(greedier):.1f}", f"{minutes:.1f}"]
        if game in until:
            first = np.median([when(curve, until[game]) for curve in curves[game, recipe]], axis=0)
            cells += [f"{until[game]:g}", f"{first[0]:,.0f}", f"{first[1]:.1f}"]
        table.append([*cells, "", "", ""][: len(table[0])])
        figures = [f"{value:.1f}" for value in (mean, low, high, minutes)]
        rows[recipe, game, str(steps)] = (str(len(scores)), *figures, "; ".join(sorted(set(hardware))))
    table.insert(1, ["---"] * len(table[0]))
    known = [["-" if cell in ("nan", "inf") else str(cell) for cell in cells] for cells in table]
    write(out / "table.md", "".join(f"| {' | '.join(cells)} |\n" for cells in known))
    merge(summary, rows)


def rewards(directory: Path) -> list[tuple[int, int, float]]:
    """Number, step and score of every evaluation in rewards.txt, none if there is no such file."""
    path = directory / "rewards.txt"
    rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [(int(number), int(step), float(score)) for number, step, score in rows]


def interval(scores: np.ndarray) -> np.ndarray:
    """The bootstrap's 95% interval of the mean of `scores` [seeds, games]: seeds are drawn, and then games of each.

    Few seeds make it a rough one. Of S seeds it sees (S - 1) / S of the variance between them: nothing for one, whose
    interval tells of its games only, and for two it is 29% too narrow where only the seeds differ. Games count in the
    seeds' means once more, so that it is 22% too wide for two seeds that do not differ.
    """
    rng, (seeds, games) = np.random.default_rng(0), scores.shape
    drawn = rng.integers(seeds, size=(10_000, seeds, 1)), rng.integers(games, size=(10_000, seeds, games))
    return np.percentile(scores[drawn].mean((1, 2)), [2.5, 97.5])


def when(curve: list[tuple], score: float) -> tuple[float, float]:
    """Steps and minutes until an evaluation first had `score`, infinite if none did."""
    return next(((step, minutes) for _, step, had, minutes in curve if had >= score), (np.inf, np.inf))


def merge(path: Path, rows: dict[tuple[str, str, str], tuple]) -> None:
    """Put `rows` by recipe, game and steps into the CSV at `path`, in place of those it has for the same."""
    old = list(csv.reader(path.read_text().splitlines()))[1:] if path.exists() else []
    merged = {tuple(row[:3]): tuple(row[3:]) for row in old} | rows
    ordered = sorted(merged, key=lambda key: (key[1], int(key[2]), key[0]))
    write(path, as_csv(SUMMARY, [(*key, *merged[key]) for key in ordered]))


def as_csv(header: tuple, rows: list[tuple]) -> str:
    """The text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def write(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    part.write_text(text)
    part.replace(path)


def draw(path: Path, curves: dict[tuple[str, str], list]) -> None:
    """Mean and range over the seeds by steps and by minutes, a column per game, as far as all seeds have come."""
    games = sorted({game for game, _ in curves})
    figure = Figure(figsize=(6 * len(games), 8), layout="constrained")
    panels = figure.subplots(2, len(games), squeeze=False)
    colours = {recipe: f"C{number}" for number, recipe in enumerate(sorted({recipe for _, recipe in curves}))}
    labels = {}
    for (game, recipe), seeds in sorted(curves.items()):
        points = np.array(list(zip(*seeds, strict=False)))  # [evaluations, seeds, 4]
        if not len(points):
            continue
        _, steps, scores, minutes = np.moveaxis(points, 2, 0)
        for panel, unit, x in zip(panels[:, games.index(game)], ("steps", "minutes"), (steps, minutes), strict=True):
            (line,) = panel.plot(x.mean(1), scores.mean(1), color=colours[recipe])
            panel.fill_between(x.mean(1), scores.min(1), scores.max(1), color=colours[recipe], alpha=0.2, linewidth=0)
            panel.set(xlabel=unit, ylabel="score", title=game)
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
            panel.grid(alpha=0.3)
            labels[f"{recipe} (seeds: {len(seeds)})"] = line
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=min(2, len(games)))
    figure.savefig(path, dpi=100)
