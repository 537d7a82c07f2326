"""Draw curves.png, the picture at the head of the README: the evaluations of the longest runs of each recipe."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

HERE = Path(__file__).parent
RUNS = {
    "the defaults": [
        "falling-rate/seed-2.txt",
        "falling-rate/seed-3-1M.txt",
        "gpu-breakout-2M/rewards.txt",
        "gpu-breakout-2M/seed-0-on-a-cpu.txt",
    ],
    "constant rate of 5e-4": ["breakout-rate-5e-4/seed-2.txt"],
    "constant rate of 2.5e-4": ["breakout-averaged-2M/seed-2.txt"],
    "2.5e-4, no averages": ["breakout-average/seed-1.txt", "breakout-2M/shipped.txt"],
    "2.5e-4, no averages, C51 upon layer norms": ["breakout-c51/seed-0.txt", "breakout-c51/seed-1.txt"],
    "2.5e-4, no averages, an update every 4 steps": ["breakout-2M/update-4.txt", "breakout-recipes/update-4.txt"],
    "classic, prioritized": ["breakout-recipes/classic-prioritized.txt"],
    "classic, uniform": ["breakout-recipes/classic-uniform.txt"],
}
EVERY = 100_000  # steps; some runs have more evaluations

figure = Figure(figsize=(6, 4.6), layout="constrained")
axes = figure.add_subplot(title="Breakout, a line per run", xlabel="steps", ylabel="mean score of ten games")
for number, (recipe, names) in enumerate(RUNS.items()):
    for name in names:
        steps, scores = np.array([line.split()[1:] for line in (HERE / name).read_text().splitlines()], float).T
        kept = steps % EVERY < 1_000  # whole iterations, so not always round
        first = name == names[0]
        style = {"label": recipe, "alpha": 1.0} if first else {"alpha": 0.5}
        axes.plot(steps[kept], scores[kept], color=f"C{number}", linewidth=2.5 if number == 0 else 1.3, **style)
axes.xaxis.set_major_formatter(EngFormatter(sep=""))
axes.set_ylim(top=300)  # room for the legend
axes.grid(alpha=0.3)
axes.legend(fontsize="small")
figure.savefig(HERE / "curves.png", dpi=100)
