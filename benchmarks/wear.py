"""How worn a network is: python benchmarks/wear.py MODEL [MODEL ...]

A network that learns for long may lose the ability to learn: weights grow, units of the hidden layer fall silent, and
what they say together spans fewer dimensions. For each model that main.py saved, from states of games that it plays:

    dormant   share of hidden units whose mean activity is at most 0.025 of the layer's (Sokar et al. 2023, section 3)
    rank      dimensions of the hidden layer's activities that hold 99% of their singular values (Kumar et al. 2021)
    gap       median difference between the two best Q values
    hidden    norm of the hidden layer's weights; conv3 likewise
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils_drl import Agent, read_model
from utils_env import AtariEnv

GAMES, STEPS, EVERY, EPSILON = 16, 300, 5, 0.02


def wear(path: str) -> dict[str, float]:
    """The figures of the model at `path`. Raises as `read_model` does."""
    about, shape, _ = read_model(path)
    agent = Agent(**shape)
    agent.load(path)
    env = AtariEnv(about["game"], GAMES, stack_size=shape["stack_size"], frame_skip=about["frame_skip"])
    rng = np.random.default_rng(0)
    states, _ = env.reset(0)
    seen = []
    for step in range(STEPS):
        states, _ = env.step(agent.run(states, epsilon=EPSILON, rng=rng))
        if step % EVERY == 0:
            seen.append(states)
    activities = []
    agent.policy.hidden.register_forward_hook(lambda layer, inputs, output: activities.append(output.relu()))
    best = torch.cat([agent.values(part) for part in seen]).topk(min(2, shape["action_dim"])).values
    hidden = torch.cat(activities)
    mean, sizes = hidden.mean(0), torch.linalg.svdvals(hidden)
    return {
        "dormant": (mean <= 0.025 * mean.mean()).float().mean().item(),
        "rank": int((sizes.cumsum(0) < 0.99 * sizes.sum()).sum()) + 1,
        "gap": (best[:, 0] - best[:, -1]).median().item(),
        "hidden": agent.policy.hidden.weight.norm().item(),
        "conv3": agent.policy.conv3.weight.norm().item(),
    }


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit(__doc__)
    for model in sys.argv[1:]:
        try:
            print(model, *(f"{name} {value:.3g}" for name, value in wear(model).items()), flush=True)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")
