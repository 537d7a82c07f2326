"""Where the time goes: emulators, learner, memory and the whole loop, measured in one run.

    python benchmarks/throughput.py [--recipe NAME] [--peers] [--only PART ...] [--json FILE] [--rounds N]
                                    [--model FILE] [--emulator-threads N] [--CONSTANT=value ...]

Every part is measured once per round, the parts in turn, so that a machine whose speed wanders troubles all alike. The
table gives medians over the rounds with the smallest and largest. What is measured is the classic recipe or another of
recipes.py (`--recipe shipped` are the defaults), with each CONSTANT that is given. With `--model` the loops begin with
a trained network, whose games are longer than those of one that knows nothing, and restart less; a low LEARNING_RATE
keeps it what it is. `--peers` adds Stable-Baselines3's DQN doing the work of the classic one (pip install -r
benchmarks/requirements.txt): Breakout, an update of 32 every 4 steps, the same threads. It computes in float32, so the
loop is measured in that as well.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recipes import RECIPES

import main
import utils_config
import utils_machine
from utils_drl import Agent
from utils_files import write_whole
from utils_log import Log
from utils_memory import PrioritizedReplayMemory, ReplayMemory
from utils_types import Transition

WINDOW = 6.0  # seconds of each measurement
SLOTS = (100_000, 1_000_000)  # of the memories measured alone
LENGTH = 1_000_000  # steps of a run of which the loop is measured ...
WARM = 4_000  # ... after so many
RATIOS = {  # name: one part, divided by the least of the others
    "prioritized / uniform, loop": ("loop_prioritized", "loop_uniform"),
    "loop / slower of its parts": ("loop_uniform", "emulators", "learner_uniform"),
    "loop / Stable-Baselines3": ("loop_uniform", "sb3"),
    "the same, both in float32": ("loop_float32", "sb3"),
}


def bench() -> None:
    """Measure everything, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default="classic-uniform", metavar="NAME")
    parser.add_argument("--peers", action="store_true", help="measure Stable-Baselines3 too")
    parser.add_argument("--only", nargs="+", metavar="PART", help="measure only these lines of the table")
    parser.add_argument("--model", metavar="FILE", help="a model of this recipe and game, for the loops to begin with")
    parser.add_argument("--emulator-threads", type=int, metavar="N", help="of them (default: as in a run)")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each part (default 3)")
    arguments, overrides = parser.parse_known_args()
    constants = vars(main)
    constants.update(RECIPES[arguments.recipe])
    try:
        utils_config.override(constants, overrides)
        utils_config.check(constants)
        device = utils_machine.choose_device(main.DEVICE)
        utils_machine.prepare(device, main.PRECISION, main.THREADS)
        for kind in (ReplayMemory, PrioritizedReplayMemory):  # or it would end in the middle of its work
            utils_machine.choose_storage(device, kind, main.MEM_SIZE, main.NUM_ENVS)  # of the learner alone
            utils_machine.check_disk(constants | {"MAX_STEPS": LENGTH}, Path("."), kind)
        trained = {}
        if arguments.model:
            trained["make_agent"] = with_weights(arguments.model)
            # An agent and games for nothing, but a model that does not fit is told now.
            trained["make_agent"](main.make_env(device).get_action_dim(), device, torch.float32)
    except (utils_config.ConfigError, OSError, ValueError) as error:
        parser.error(str(error))
    if arguments.emulator_threads is not None:
        if arguments.emulator_threads < 1:
            parser.error(f"--emulator-threads {arguments.emulator_threads}: there must be at least 1")
        utils_machine.choose_emulator_threads = lambda _: arguments.emulator_threads

    parts = {
        "emulators": lambda: emulators(device),
        "acting": lambda: acting(device),
        "learner_uniform": lambda: learner(device, ReplayMemory),
        "learner_prioritized": lambda: learner(device, PrioritizedReplayMemory),
        "loop_uniform": lambda: loop(False, **trained),
        "loop_prioritized": lambda: loop(True, **trained),
    }
    if arguments.peers:
        parts["loop_float32"] = lambda: loop(False, PRECISION="float32", **trained)
        parts["sb3"] = stable_baselines3
    if unknown := [name for name in arguments.only or [] if name not in parts]:
        parser.error(f"--only {unknown[0]}: the parts are {', '.join(parts)}")
    parts = {name: measure for name, measure in parts.items() if name in (arguments.only or parts)}
    memories = {}  # first, because these may not fit
    for slots in [] if arguments.only else SLOTS:
        try:
            memories[slots] = memory_times(device, slots)
        except (utils_config.ConfigError, OSError) as error:  # the second from a full disk
            print(f"not measured: {error}", file=sys.stderr)
    rates: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(arguments.rounds):
        for name, measure in parts.items():
            print(f"round {number + 1} of {arguments.rounds}: {name}", end="\r", file=sys.stderr)
            rates[name].append(measure())
    report(rates, memories, device, arguments.json)


def emulators(device: torch.device) -> float:
    """Steps per second of random play, frames delivered to the device, nothing learned."""
    env = main.make_env(device)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    return main.NUM_ENVS * rate(lambda: env.step(rng.integers(env.get_action_dim(), size=main.NUM_ENVS)), device)


def acting(device: torch.device) -> float:
    """Greedy actions per second."""
    agent, states = make_agent(device), random_frames(main.NUM_ENVS, main.STACK_SIZE).to(device)
    return main.NUM_ENVS * rate(lambda: agent.run(states, epsilon=0.0), device)


def learner(device: torch.device, kind: type[ReplayMemory]) -> float:
    """Updates per second, as steps per second: times POLICY_UPDATE. As many updates at once as in the loop."""
    agent, memory = make_agent(device), filled(kind, main.MEM_SIZE, device)
    updates = max(main.NUM_ENVS // main.POLICY_UPDATE, 1)
    return updates * main.POLICY_UPDATE * rate(lambda: agent.learn(memory, main.BATCH_SIZE, updates), device)


def loop(prioritized: bool, **others) -> float:
    """Steps per second of main.main() while it trains, between its evaluations, with `others` of its names."""
    constants = {
        "PRIORITIZED": prioritized,
        "WARM_STEPS": WARM,
        "MAX_STEPS": LENGTH,
        "EVALUATE_FREQ": LENGTH,
        "EVAL_EPISODES": 1,
        "EVAL_EPS": 1.0,
        "EPS_START": main.EPS_END,
        "SAVE_PREFIX": "./models",  # in the directory that is removed
        "Log": Stopwatch,
        **others,
    }
    rounding = torch.backends.cudnn.conv.fp32_precision  # which float32 changes for the whole process
    before = {name: getattr(main, name) for name in constants}
    torch.cuda.empty_cache()  # as in `filled`
    with tempfile.TemporaryDirectory(dir=".") as directory, contextlib.chdir(directory):
        vars(main).update(constants)
        try:
            main.main()
        except Stopwatch.Enough as enough:
            return enough.rate
        finally:
            vars(main).update(before)
            torch.backends.cudnn.conv.fp32_precision = rounding
    raise RuntimeError("the loop ended before it was measured")


def with_weights(path: str) -> Callable[..., Agent]:
    """main.make_agent, and then the weights of the model at `path`."""
    make_agent, model = main.make_agent, Path(path).resolve()  # the loop has a directory of its own

    def make(*arguments) -> Agent:
        agent = make_agent(*arguments)
        agent.load(model)
        return agent

    return make


class Stopwatch(Log):
    """A log that times a window of training, from one look to another, and then ends the run."""

    start = None

    class Enough(Exception):
        """The window is over."""

        def __init__(self, rate: float):
            super().__init__()
            self.rate = rate

    def show(self, step: int, loss: torch.Tensor | None) -> None:
        """The window begins when training is warm."""
        super().show(step, loss)
        now = time.perf_counter()
        if self.start is None and step > main.WARM_STEPS + 20 * main.NUM_ENVS:
            self.start, self.first = now, step
        elif self.start is not None and now - self.start > WINDOW:
            raise Stopwatch.Enough((step - self.first) / (now - self.start))


def stable_baselines3() -> float:
    """Steps per second of Stable-Baselines3's DQN in its training phase, at this script's ratio of updates to steps."""
    from stable_baselines3 import DQN
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    class Window(BaseCallback):
        start, first, rate = None, 0, None

        def _on_step(self) -> bool:
            now = time.perf_counter()
            if self.start is None and self.num_timesteps > 1_400:
                self.start, self.first = now, self.num_timesteps
            elif self.start is not None and now - self.start > WINDOW:
                self.rate = (self.num_timesteps - self.first) / (now - self.start)
            return self.rate is None

    env = VecFrameStack(make_atari_env("BreakoutNoFrameskip-v4", n_envs=1, seed=0), n_stack=4)
    model = DQN("CnnPolicy", env, buffer_size=10_000, learning_starts=1_000, batch_size=32, train_freq=4, device="auto")
    window = Window()
    model.learn(1_000_000, callback=window)
    env.close()
    return window.rate


def memory_times(device: torch.device, slots: int) -> dict[str, float]:
    """Microseconds of one sample, one priority update (without gathering for it) and one checkpoint of `slots`."""
    times = {}
    memory = None
    for name, kind in (("uniform", ReplayMemory), ("prioritized", PrioritizedReplayMemory)):
        del memory  # the next one may need its room
        memory = filled(kind, slots, device)
        times[f"sample_{name}"] = 1e6 / rate(lambda memory=memory: memory.sample(main.BATCH_SIZE), device, window=1.0)
    batch = memory.sample(main.BATCH_SIZE)
    errors = torch.rand(main.BATCH_SIZE, device=device)
    times["update"] = 1e6 / rate(lambda: memory.update_priorities(batch.indices, errors), device, window=1.0)
    with tempfile.TemporaryDirectory(dir=".") as directory:
        start = time.perf_counter()
        write_whole(Path(directory) / "checkpoint", lambda file: torch.save(memory.state_dict(), file))
        times["checkpoint"] = 1e6 * (time.perf_counter() - start)
    return times


def rate(call, device: torch.device, window: float | None = None) -> float:
    """Calls per second, over at least `window` seconds, by default WINDOW, after a few to warm up."""
    window = WINDOW if window is None else window
    for _ in range(5):
        call()
    wait(device)
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < window:
        call()
        calls += 1
        if calls % 50 == 0:
            wait(device)  # or the host would only measure how fast it can ask
    wait(device)
    return calls / (time.perf_counter() - start)


def wait(device: torch.device) -> None:
    """Until the device has done all it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def make_agent(device: torch.device) -> Agent:
    """An agent as main.main() makes it, for four actions."""
    return main.make_agent(4, device, utils_machine.choose_dtype(main.PRECISION, device))


def random_frames(*shape: int) -> torch.Tensor:
    """uint8 noise of 84x84 frames."""
    return torch.randint(0, 255, (*shape, 84, 84), dtype=torch.uint8)


def filled(kind: type[ReplayMemory], slots: int, device: torch.device) -> ReplayMemory:
    """A full memory of noise."""
    games = main.NUM_ENVS
    torch.cuda.empty_cache()  # what earlier parts left does not count as free otherwise; nothing without a GPU
    place, _ = utils_machine.choose_storage(device, kind, slots, games)
    memory = main.make_memory(kind, slots, place, device)
    row = Transition(
        random_frames(games).to(device),
        torch.zeros(games, dtype=torch.int64, device=device),
        torch.ones(games, device=device),
        torch.zeros(games, dtype=torch.bool, device=device),
        torch.full((games,), 3, device=device),
    )
    for _ in range(slots // games + 2):
        memory.push(row)
    return memory


def report(rates: dict, memories: dict, device: torch.device, path: str | None) -> None:
    """Print the table and write the JSON."""
    middle = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{'':22}{'steps/s':>9}{'least':>9}{'most':>9}")
    for name, values in rates.items():
        print(f"{name:22}{middle[name]:9.0f}{min(values):9.0f}{max(values):9.0f}")
    ratios = {
        name: middle[part] / min(middle[other] for other in others)
        for name, (part, *others) in RATIOS.items()
        if {part, *others} <= middle.keys()
    }
    print()
    for name, value in ratios.items():
        print(f"{name:30}{value:7.2f}")
    if memories:
        print(f"\n{'microseconds':22}" + "".join(f"{name:>20}" for name in next(iter(memories.values()))))
    for slots, times in memories.items():
        print(f"{slots:<22,}" + "".join(f"{value:20.0f}" for value in times.values()))
    about = machine(device)
    print()
    for name, value in about.items():
        print(f"{name:22}{value}")
    if path:
        figures = {
            name: {"steps_per_s": middle[name], "least": min(values), "most": max(values), "rounds": values}
            for name, values in rates.items()
        }
        figures |= {"ratios": ratios, "memory_microseconds": memories, "machine": about}
        figures["constants"] = utils_config.check(vars(main))
        Path(path).write_text(json.dumps(figures, indent=2) + "\n")


def machine(device: torch.device) -> dict[str, str | int | float]:
    """What the figures were taken on."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # there bytes
    about = {
        **utils_machine.describe_start(device, vars(main)),
        "emulator_threads": min(utils_machine.choose_emulator_threads(device), main.NUM_ENVS),
        "games": main.NUM_ENVS,
        "peak_ram_gb": round(peak / 1e9, 2),
    }
    if importlib.util.find_spec("stable_baselines3"):
        about["stable-baselines3"] = importlib.metadata.version("stable-baselines3")
    if device.type == "cuda":
        about["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return about


if __name__ == "__main__":
    bench()
