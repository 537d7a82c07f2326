"""How fast a network learns: the regression inside Q-learning, without the rest of it.

    python benchmarks/fit.py CHECKPOINT MODEL [--recipes NAME ...] [--updates N] [--CONSTANT=value ...]

The network of MODEL gives the transitions in the replay memory of CHECKPOINT their TD targets, once and for all. For
each recipe a new network learns them with the agent's own learning step, from batches drawn uniformly, and a row tells
how much of the targets' variance it has left unexplained as it goes on, on 2,048 draws from the same memory. That takes
a minute where a run takes an hour; of what a moving target does to learning it says nothing, nor of states never seen.
CHECKPOINT and MODEL are files of one run, of any game. Of a recipe only what makes the network and its updates counts:
LEARNING_RATE (which does not fall here), ADAM_EPS, BATCH_SIZE, DUELING, LAYER_NORM, QUANTILES, ATOMS, V_MAX and SEED.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from learning import flags, resolve
from recipes import RECIPES

import main
import utils_config
import utils_machine
from utils_drl import Agent
from utils_memory import ReplayMemory
from utils_types import Batch

AFTER = (250, 500, 1_000, 2_000, 3_000, 5_000, 10_000, 20_000, 50_000, 100_000)  # updates
TEST, PART, TURN = 2_048, 256, 4  # draws to test with, states valued at a time, updates between looks


class Lesson:
    """A memory whose transitions are worth what a teacher says: that is their return, and nothing follows."""

    def __init__(self, memory: ReplayMemory, teacher: Agent):
        self._memory, self._teacher = memory, teacher
        self.device, self.generator = memory.device, memory.generator

    def sample(self, batch_size: int, batches: int = 1) -> Batch:
        """As of the memory, with fixed targets."""
        batch = self._memory.sample(batch_size, batches)
        following = in_parts(self._teacher, batch.next_states).max(1).values
        targets = batch.returns + batch.discounts * following
        return batch._replace(returns=targets, discounts=torch.zeros_like(batch.discounts))

    def update_priorities(self, indices: Tensor, td_errors: Tensor) -> None:
        """There are none."""


def in_parts(agent: Agent, states: Tensor) -> Tensor:
    """The agent's Q values [B, A] of `states` [B, S, H, W]."""
    return torch.cat([agent.values(part) for part in states.split(PART)])


def unexplained(agent: Agent, test: Batch) -> float:
    """The share of the targets' variance that the agent's Q values leave."""
    values = in_parts(agent, test.states).gather(1, test.actions[:, None]).squeeze(1)
    return ((values - test.returns).square().mean() / test.returns.var()).item()


def bench() -> None:
    """Fit each recipe and print its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["shipped"], metavar="NAME")
    parser.add_argument("--updates", type=int, default=3_000, help="of each recipe (default 3,000)")
    asked, overrides = parser.parse_known_args()
    try:
        machine = resolve(overrides)
        recipes = {recipe: resolve([*flags(RECIPES[recipe]), *overrides]) for recipe in asked.recipes}
        device = utils_machine.choose_device(machine["DEVICE"])
        dtype = utils_machine.prepare(device, machine["PRECISION"], machine["THREADS"])
    except utils_config.ConfigError as error:
        parser.error(str(error))

    try:
        saved = torch.load(asked.checkpoint, map_location="cpu", mmap=True, weights_only=True)
        run, state = saved["constants"], saved["memory"]
    except Exception as error:  # what is no checkpoint raises any of a dozen kinds
        parser.error(f"{asked.checkpoint} is not a checkpoint of this program: {error or type(error).__name__}")
    try:
        teacher, _ = Agent.from_model(asked.model, device, dtype=dtype, graphs=False)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    of_memory = {name: run[name] for name in ("NUM_ENVS", "STACK_SIZE", "N_STEP", "GAMMA")}
    vars(main).update(of_memory)
    try:
        capacity = utils_machine.count_memory(run)
        storage, _ = utils_machine.choose_storage(device, ReplayMemory, capacity, run["NUM_ENVS"])
    except utils_config.ConfigError as error:
        parser.error(str(error))
    memory = main.make_memory(ReplayMemory, capacity, storage, device)
    memory.load_state_dict(state)
    del saved, state
    lesson = Lesson(memory, teacher)
    memory.reseed([machine["SEED"], 0])
    test = lesson.sample(TEST)

    stops = sorted({stop for stop in AFTER if stop < asked.updates} | {asked.updates})
    width = max(map(len, recipes))
    print(f"{'updates':{width}}" + "".join(f"{stop:8,}" for stop in stops))
    for recipe, constants in recipes.items():
        vars(main).update(constants | of_memory | {"AVERAGE_STEPS": 1})  # what has been learned now, not on average
        agent = main.make_agent(teacher.action_dim, device, dtype)
        memory.reseed([constants["SEED"], 1])
        print(f"{recipe:{width}}", end="", flush=True)
        done = 0
        for stop in stops:
            while done < stop:
                turn = min(TURN, stop - done)
                agent.learn(lesson, constants["BATCH_SIZE"], turn)
                done += turn
            print(f"{unexplained(agent, test):8.2f}", end="", flush=True)
        print()


if __name__ == "__main__":
    bench()
