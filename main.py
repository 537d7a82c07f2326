"""Train a DQN on an Atari game: python main.py [--CONSTANT=value ...]

One step is one decision of the agent in one game, FRAME_SKIP emulator frames. NUM_ENVS games advance together, so one
iteration of the loop is NUM_ENVS steps. Every count below is in steps unless it says otherwise.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before and after a run there is nothing to put in order

import torch

import utils_config
import utils_log
import utils_machine
import utils_play
import utils_run
from utils_drl import Agent
from utils_env import AtariEnv
from utils_files import model_name, recording_name
from utils_log import Log
from utils_memory import PrioritizedReplayMemory, ReplayMemory
from utils_types import Transition

# The experiment
GAME: str = "breakout"  # any one-player game of ale-py; ALE/Breakout-v5 and BreakoutNoFrameskip-v4 mean the same one
SEED: int = 0  # same seed, same run (on a CPU bit for bit)
MAX_STEPS: int = 10_000_000  # steps; a finished run goes on with more; 50_000_000 are the 200M frames of Mnih et al.
NUM_ENVS: int = 32  # games in step; more of them feed more cores, and have more updates between two actions
STACK_SIZE: int = 4  # frames the agent sees, so that it sees motion
FRAME_SKIP: int = 4  # emulator frames per step
REPEAT_ACTION_PROBABILITY: float = 0.0  # sticky actions: that an emulator frame repeats the last action instead
FULL_ACTION_SPACE: bool = False  # all 18 actions of the joystick, not only those that the game uses
TERMINAL_ON_LIFE_LOSS: bool = True  # for learning a lost life is an end, though the game goes on

# The algorithm: what measured best in 800,000 steps of Breakout; README.md has a classic recipe as one line
GAMMA: float = 0.99  # discount per step
EPS_START: float = 1.0  # probability of a random action at first, and until learning starts
EPS_END: float = 0.01  # probability of a random action in the end
EPS_DECAY: int = 250_000  # steps of training over which it falls, linearly
BATCH_SIZE: int = 32  # transitions per update
POLICY_UPDATE: int = 8  # steps per update; the usual 4, in 1.9 times the time, scored less at a constant rate of 2.5e-4
TARGET_UPDATE: int = 8_000  # steps between copies of the policy into the target network
WARM_STEPS: int = 20_000  # steps of play before learning starts, random where EPS_START is 1
MEM_SIZE: int = 1_000_000  # steps the replay memory keeps, 7.1 kB each, fewer in a shorter run; 100_000 learned less
LEARNING_RATE: float = 5e-4  # of Adam at first ...
LEARNING_RATE_END_FACTOR: float = 0.2  # ... times this in the end; Breakout was learned sooner than at constant ones
LEARNING_RATE_DECAY: int = 2_000_000  # steps of training until then, linearly
ADAM_EPS: float = 1.5e-4  # of Adam; large, so that rare small gradients do not become large steps
PRIORITIZED: bool = True  # replay surprising transitions more often (Schaul et al. 2016)
ALPHA: float = 0.5  # how much more often: 0 is uniform, 1 in proportion to the TD error
BETA_START: float = 0.4  # how far importance weights correct for it at first ...
BETA_STEPS: int = 2_000_000  # ... and steps until they do so fully, linearly
DOUBLE_DQN: bool = True  # the policy network chooses the action that the target network values
DUELING: bool = False  # separate streams for the state's value and the actions' advantages
N_STEP: int = 3  # rewards summed before bootstrapping
AVERAGE_STEPS: int = 160_000  # steps over which models average the weights, at most a tenth of the training; 1: none
LAYER_NORM: bool = False  # normalise what enters the hidden layer, and its units; wants ADAM_EPS 1e-8
QUANTILES: int = 1  # values per action; above 1 the loss is QR-DQN's (Dabney et al. 2018), 1 is the classic loss
ATOMS: int = 1  # above 1, best odd, so many possible returns per action and the loss of C51 (Bellemare et al. 2017)
V_MAX: float = 10.0  # with ATOMS: the largest of those returns, and minus that the least; rewards are clipped to 1

# Measuring
EVALUATE_FREQ: int = 400_000  # steps between evaluations; each takes seconds, and a GPU makes 10,000 steps in one
EVAL_EPISODES: int = 10  # games per evaluation
EVAL_FRAMES: int = 18_000  # emulator frames after which a game of them ends, five minutes
EVAL_EPS: float = 0.05  # probability of a random action in them; at 0 a greedy Breakout agent may wait for ever
RENDER: bool = False  # write one evaluation game as pictures and an animation, eval_000/ and eval_000.gif
PLAY: str = ""  # a model such as models/model_008: play a game with it, write that as play.gif, and train nothing
SAVE_PREFIX: str = "./models"  # directory of the models and checkpoints
CHECKPOINT_FREQ: int = 1_000_000  # steps between checkpoints, from which the same command goes on; games restart there

# The machine
DEVICE: str = "auto"  # cuda when there is one, else mps, else cpu
THREADS: int = 0  # of the learner; 0: one with a GPU, else one per core or what its quota allows; 1 beside other work
PRECISION: str = "auto"  # arithmetic of the networks: float32, bfloat16, or bfloat16 where the hardware is made for it
CUDA_GRAPHS: bool = True  # on a GPU: record its work of a step once and replay it; False is the plain path


def main() -> None:
    constants = utils_config.check(globals())
    device = utils_machine.choose_device(DEVICE)
    dtype = utils_machine.prepare(device, PRECISION, THREADS)
    if PLAY:
        utils_play.play(PLAY, device, dtype, EVAL_EPS, EVAL_FRAMES, SEED)
        return
    Memory = PrioritizedReplayMemory if PRIORITIZED else ReplayMemory
    with utils_run.open_run(constants, device, Memory) as run:
        print(utils_log.introduction(constants, device, run.room), file=sys.stderr)
        train(run, device, dtype, Memory)
    print(utils_log.conclusion(run), file=sys.stderr)


def train(run: utils_run.Run, device: torch.device, dtype: torch.dtype, Memory: type[ReplayMemory]) -> None:
    """Train an agent of `dtype` on `device`, from where `run` stands to MAX_STEPS."""
    env = make_env(device)
    agent = make_agent(env.get_action_dim(), device, dtype)
    memory = make_memory(Memory, utils_machine.count_memory(run.constants), run.storage, device)
    loss = None

    def evaluate(step: int) -> None:
        """Play, save and note the evaluation that is due after `step`, if there is one."""
        if run.is_evaluated or not (due(step, EVALUATE_FREQ) or step >= MAX_STEPS):
            return
        number = len(run.evaluations)
        log.settle(step)
        with log.pause(step, "evaluating the network"):
            run.check(loss, weights=True)
            with run.interruptible():
                scores = env.evaluate(
                    agent, EVAL_EPISODES, EVAL_EPS, seed=[SEED, step, 1], max_frames=EVAL_FRAMES, record=RENDER
                )
                if RENDER:
                    env.save_recording(recording_name(number))
            agent.save(run.models / model_name(number), rules=env.rules, step=step, scores=scores.tolist())
            run.report(scores)
            log.tell_evaluation()

    def restart(step: int) -> tuple[torch.Tensor, Transition]:
        """Start the games and all random numbers anew, from SEED and `step` alone; the games' states and first row."""
        with log.pause(step, "starting the games"), run.interruptible():
            agent.reseed([SEED, step, 2])
            memory.reseed([SEED, step, 3])
            return env.reset(seed=[SEED, step, 0])

    start = run.resume(agent, memory)
    with Log(run, env, agent, memory, start) as log:
        evaluate(start)
        states, row = restart(start)
        for step in range(start + NUM_ENVS, MAX_STEPS + NUM_ENVS, NUM_ENVS):
            training = len(memory) >= WARM_STEPS
            actions = agent.run(states, training)  # the only wait for the device: it hands over the actions ...
            env.send(actions)  # ... the emulators start on their own threads ...
            memory.push(row)  # ... and meanwhile what led here is remembered ...
            if due(step, utils_log.SHOW_FREQ):
                run.check(loss)
                log.show(step, loss)
            if training and (updates := due(step, POLICY_UPDATE)):
                loss = agent.learn(memory, BATCH_SIZE, updates)  # ... and the learner works
            states, row = env.recv()
            run.step = step  # what a checkpoint would hold from here on
            if due(step, TARGET_UPDATE):
                agent.sync()
            evaluate(step)
            if run.checkpoint_due():
                log.settle(step)
                with log.pause(step, "writing a checkpoint"):
                    run.save(loss)
                states, row = restart(step)  # the row in hand is given up: its games end here


def make_env(device: torch.device) -> AtariEnv:
    """The games of the constants, for an agent on `device`."""
    return AtariEnv(
        GAME,
        NUM_ENVS,
        device,
        stack_size=STACK_SIZE,
        frame_skip=FRAME_SKIP,
        repeat_action_probability=REPEAT_ACTION_PROBABILITY,
        full_action_space=FULL_ACTION_SPACE,
        terminal_on_life_loss=TERMINAL_ON_LIFE_LOSS,
        num_threads=utils_machine.choose_emulator_threads(device),
        graphs=CUDA_GRAPHS,
    )


def make_agent(action_dim: int, device: torch.device, dtype: torch.dtype) -> Agent:
    """The agent of the constants."""
    return Agent(
        action_dim,
        device,
        stack_size=STACK_SIZE,
        learning_rate=LEARNING_RATE,
        learning_rate_end_factor=LEARNING_RATE_END_FACTOR,
        learning_rate_decay=LEARNING_RATE_DECAY,
        adam_eps=ADAM_EPS,
        eps_start=EPS_START,
        eps_end=EPS_END,
        eps_decay=EPS_DECAY,
        double_dqn=DOUBLE_DQN,
        dueling=DUELING,
        quantiles=QUANTILES,
        atoms=ATOMS,
        v_max=V_MAX,
        layer_norm=LAYER_NORM,
        average_updates=AVERAGE_STEPS / POLICY_UPDATE,
        dtype=dtype,
        graphs=CUDA_GRAPHS,
        seed=SEED,
    )


def make_memory(Memory: type[ReplayMemory], capacity: int, storage: torch.device, device: torch.device) -> ReplayMemory:
    """The replay memory of the constants, but for its capacity, in `storage` for a learner on `device`."""
    priorities = {"alpha": ALPHA, "beta_start": BETA_START, "beta_steps": BETA_STEPS}
    return Memory(
        capacity,
        NUM_ENVS,
        stack_size=STACK_SIZE,
        n_step=N_STEP,
        gamma=GAMMA,
        device=storage,
        learner_device=device,
        graphs=CUDA_GRAPHS,
        seed=SEED,
        **(priorities if issubclass(Memory, PrioritizedReplayMemory) else {}),
    )


def due(step: int, every: int) -> int:
    """How many multiples of `every` the iteration that ends at `step` has passed."""
    return step // every - (step - NUM_ENVS) // every


if __name__ == "__main__":
    sys.exit(utils_config.run(main, globals()))
