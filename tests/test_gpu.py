"""The same numbers on a CUDA GPU as on the CPU, and by CUDA graphs as without. Run with: python -m pytest -m gpu"""

import io

import numpy as np
import pytest
import torch

import main
import utils_machine
from sumtree import SumTree
from utils_drl import Agent, chosen
from utils_env import AtariEnv
from utils_graph import CudaGraph
from utils_memory import PrioritizedReplayMemory, ReplayMemory
from utils_types import Batch, Transition

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def recorded(request, capfd, monkeypatch):
    """Graphs are really used, by algorithms that give the same numbers every time."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    # What a whole run sets for its process is set back after it.
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", torch.backends.cudnn.conv.fp32_precision)
    yield
    if "recording_fails" not in request.node.name:
        assert "CUDA graphs do not work" not in capfd.readouterr().err


def on(device, values):
    """The NamedTuple `values` with every tensor on `device`."""
    return type(values)(*(value.to(device) for value in values))


def rows(count, games, seed=0):
    """Random rows: frames of 84x84 noise, lost lives, game ends and truncations."""
    generator = torch.Generator().manual_seed(seed)
    ages = torch.zeros(games, dtype=torch.int64)
    for number in range(count):
        chance = torch.rand(games, generator=generator)
        ages = torch.where((chance < 0.1) | (number == 0), 0, (ages + 1).clamp_max(3))
        yield Transition(
            torch.randint(0, 256, (games, 84, 84), dtype=torch.uint8, generator=generator),
            torch.randint(0, 4, (games,), generator=generator),
            torch.randint(-1, 2, (games,), generator=generator).float(),
            (chance > 0.9) & (ages > 0),
            ages,
        )


@pytest.mark.parametrize("capacity", [1, 7, 1000, 2**17])
def test_the_tree_keeps_exactly_the_sums_of_the_cpu(capacity):
    here, there = SumTree(capacity), SumTree(capacity, CUDA)
    generator = torch.Generator().manual_seed(capacity)
    for _ in range(20):
        indices = torch.randint(0, capacity, (64,), generator=generator)
        priorities = torch.rand(64, dtype=torch.float64, generator=generator)
        here.update(indices, priorities)
        there.update(indices.to(CUDA), priorities.to(CUDA))
    assert torch.equal(here.total(), there.total().cpu())
    ends = torch.arange(min(capacity, 1000) + 1)
    assert torch.equal(here.prefix_sum(ends), there.prefix_sum(ends.to(CUDA)).cpu())
    mass = torch.rand(1000, dtype=torch.float64, generator=generator) * here.total() * 0.999
    assert torch.equal(here.find(mass), there.find(mass.to(CUDA)).cpu())
    drawn, probabilities = there.sample(256, torch.Generator(CUDA).manual_seed(0))
    assert (probabilities > 0).all()
    assert int(drawn.max()) < capacity


@pytest.mark.parametrize("kind", [ReplayMemory, PrioritizedReplayMemory])
@pytest.mark.parametrize("n_step", [1, 3])
def test_the_memory_holds_the_same_transitions_as_on_the_cpu(kind, n_step):
    here, there = (kind(600, 8, n_step=n_step, device=device) for device in ("cpu", CUDA))
    for row in rows(100, 8):
        here.push(row)
        there.push(on(CUDA, row))
    assert torch.equal(here.sampleable(), there.sampleable().cpu())
    for mine, its in zip(here.gather(here.sampleable()), there.gather(there.sampleable()), strict=True):
        assert torch.allclose(mine, its.cpu(), rtol=1e-6, atol=1e-6)  # sums of three rewards, in another order
    batch = there.sample(32, 4)
    assert torch.isin(batch.indices.cpu(), here.sampleable()).all()
    there.update_priorities(batch.indices, torch.rand(128, device=CUDA))


@pytest.mark.parametrize("kind", [ReplayMemory, PrioritizedReplayMemory])
def test_a_memory_in_ram_delivers_to_the_gpu(kind):
    memory = kind(600, 8, learner_device=CUDA)
    for row in rows(100, 8):
        memory.push(on(CUDA, row))
    batch = memory.sample(32)
    assert {value.device.type for value in batch} == {"cuda"}
    stored = memory.gather(batch.indices.cpu())._replace(weights=batch.weights.cpu())
    for mine, its in zip(stored, batch, strict=True):
        assert torch.equal(mine.cpu(), its.cpu())
    assert Agent(4, CUDA, dtype=torch.bfloat16).learn(memory, 32, 2).isfinite()


@pytest.mark.parametrize("kind", [ReplayMemory, PrioritizedReplayMemory])
def test_a_memory_on_the_gpu_survives_a_checkpoint(kind):
    before, after = (kind(600, 8, n_step=3, device=CUDA) for _ in range(2))
    for row in rows(100, 8):
        before.push(on(CUDA, row))
    before.update_priorities(before.sampleable(), torch.rand(len(before.sampleable()), device=CUDA))
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    for memory in (before, after):
        memory.reseed(5)
    for mine, its in zip(before.sample(32, 4), after.sample(32, 4), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("capacity", [2_000, 1_000_000])  # the frames of the second lie beyond 2^31 bytes
def test_a_memory_that_has_wrapped_around_gives_the_frames_of_its_own_rows(capacity):
    games, n_step = 20, 3
    if PrioritizedReplayMemory.needed_bytes(capacity, games) > torch.cuda.mem_get_info()[0] - (1 << 30):
        pytest.skip("does not fit on this GPU")
    memory = PrioritizedReplayMemory(capacity, games, n_step=n_step, device=CUDA)
    pushed = capacity // games + 50
    for number in range(pushed):
        frames = torch.full((games, 84, 84), number % 256, dtype=torch.uint8, device=CUDA)
        frames[:, 0] = number // 256
        row = Transition(
            frames,
            torch.full((games,), number % 4, device=CUDA),
            torch.zeros(games, device=CUDA),
            torch.zeros(games, dtype=torch.bool, device=CUDA),
            torch.full((games,), min(number, 3), device=CUDA),
        )
        memory.push(row)
    indices = memory.sampleable()
    assert len(indices) == (capacity // games - 3 - n_step) * games
    for some in (indices[:500], indices[-500:], memory.sample(32, 8).indices):
        batch = memory.gather(some)
        row = some // games
        for states, last in ((batch.states, row), (batch.next_states, row + n_step)):
            numbers = states[:, :, 1, 0].long() + 256 * states[:, :, 0, 0].long()
            assert torch.equal(numbers, last[:, None] + torch.arange(-3, 1, device=CUDA))
        assert torch.equal(batch.actions, (row + 1) % 4)
    drawn = memory.sample(32, 8).indices
    assert torch.isin(drawn, indices).all()
    assert int(drawn.max() - drawn.min()) > capacity // 2


NETWORKS = {
    "classic": {},
    "quantiles": {"quantiles": 8},
    "atoms": {"atoms": 51},
    "norms": {"layer_norm": True},
    "atoms-norms": {"atoms": 51, "layer_norm": True},
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("dueling", [False, True])
def test_the_learning_step_gives_the_numbers_of_the_cpu(dueling, network):
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        torch.randint(0, 256, (32, 4, 84, 84), dtype=torch.uint8, generator=generator),
        torch.randint(0, 4, (32,), generator=generator),
        torch.rand(32, generator=generator),
        torch.randint(0, 256, (32, 4, 84, 84), dtype=torch.uint8, generator=generator),
        torch.full((32,), 0.99),
        torch.rand(32, generator=generator),
        torch.arange(32),
    )

    class Memory:
        """Hands out the one batch."""

        device, generator = CUDA, torch.Generator(CUDA)

        def __init__(self, device):
            self.batch = on(device, batch)

        def sample(self, batch_size, batches=1):
            """Give the batch."""
            return self.batch

        def update_priorities(self, indices, td_errors):
            """Keep the TD errors."""
            self.td_errors = td_errors

    errors, weights = [], []
    for device in ("cpu", CUDA):  # on the GPU the last updates are replays of a graph
        agent = Agent(4, device, dueling=dueling, double_dqn=True, dtype=torch.float64, **network)
        memory = Memory(device)
        for _ in range(CudaGraph.WARM_UP + 4):
            agent.learn(memory, 32)
        errors.append(memory.td_errors.cpu())
        weights.append({name: value.cpu() for name, value in agent.policy.state_dict().items()})
    assert torch.allclose(*errors, rtol=1e-6, atol=1e-9)
    for name in weights[0]:
        assert torch.allclose(weights[0][name], weights[1][name], rtol=1e-6, atol=1e-9), name


@pytest.fixture(params=[False, True], ids=["deterministic", "as-in-a-run"])
def convolutions(request, monkeypatch):
    """A function after which cuDNN's are those that give the same numbers every time, or the fastest, as in a run."""

    def settle() -> None:
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", request.param)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", not request.param)

    return settle


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("network", [NETWORKS["classic"], NETWORKS["atoms-norms"]], ids=["classic", "atoms-norms"])
def test_gradients_in_bfloat16_are_those_of_float32_but_for_rounding(monkeypatch, convolutions, network, seed):
    """Layer by layer: a CPU gives 0.1 for the norm of what differs, and 0.02 for what of it points the same way."""
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    memory = ReplayMemory(600, 8, n_step=3, device=CUDA)
    for row in rows(60, 8, seed):
        memory.push(on(CUDA, row))
    agents = []
    for dtype in (torch.float32, torch.bfloat16):
        memory.reseed(seed)
        agents.append(Agent(4, CUDA, double_dqn=True, dtype=dtype, graphs=False, seed=seed, **network))
        agents[-1].learn(memory, 32)
        convolutions()
    for (name, exact), rounded in zip(agents[0].policy.named_parameters(), agents[1].policy.parameters(), strict=True):
        norm = exact.grad.norm()
        assert norm > 0, name
        assert (rounded.grad - exact.grad).norm() < 0.2 * norm, name
        assert (rounded.grad * exact.grad).sum() / norm**2 == pytest.approx(1, abs=0.06), name


def trained(graphs, kind, updates, **network):
    """An agent after learning `updates` at a time from a memory of noise, what it drew, and the losses."""
    agent = Agent(4, CUDA, double_dqn=True, graphs=graphs, **network)
    memory = kind(600, 8, n_step=3, device=CUDA)
    drawn, losses = [], []
    for number, row in enumerate(rows(60 + len(updates), 8)):
        memory.push(on(CUDA, row))
        if number >= 60:
            losses.append(agent.learn(memory, 32, updates[number - 60]).clone())
            if number % 10 == 0:
                agent.sync()
            drawn.append(memory.sample(1).indices)
    return agent, torch.cat(drawn).cpu(), torch.stack(losses).cpu()


@pytest.mark.parametrize("network", [NETWORKS["classic"], NETWORKS["atoms-norms"]], ids=["classic", "atoms-norms"])
@pytest.mark.parametrize("kind", [ReplayMemory, PrioritizedReplayMemory])
def test_graphs_learn_what_the_plain_path_learns(kind, network):
    """From the same draws: what a graph draws from is the memory's generator and its tree of the moment."""
    updates = [2, 3] * 12  # two graphs take turns
    (plain, its_draws, its_losses), (fast, draws, losses) = (
        trained(graphs, kind, updates, average_updates=20, **network) for graphs in (False, True)
    )
    assert torch.equal(draws, its_draws)
    assert torch.allclose(losses, its_losses, rtol=1e-3, atol=1e-5)
    assert fast.read_statistics() == pytest.approx(plain.read_statistics(), rel=1e-2)
    for part in ("policy", "average"):
        for mine, its in zip(*(getattr(agent, part).parameters() for agent in (fast, plain)), strict=True):
            assert torch.allclose(mine, its, rtol=0, atol=1e-4)
    assert not torch.equal(fast.average.hidden.weight, fast.policy.hidden.weight)


@pytest.mark.parametrize("network", [NETWORKS["classic"], NETWORKS["atoms-norms"]], ids=["classic", "atoms-norms"])
def test_a_thousand_updates_by_graphs_in_bfloat16_stay_with_plain_float32(monkeypatch, convolutions, network):
    """On the values that are taught, for which a CPU gives 0.02 to 0.06; those of other actions drift further."""
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    memory = ReplayMemory(600, 8, n_step=3, device=CUDA)
    for row in rows(60, 8):
        memory.push(on(CUDA, row))
    taught = memory.gather(memory.sampleable())
    losses, values = [], []
    for graphs, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        agent = Agent(4, CUDA, double_dqn=True, dtype=dtype, graphs=graphs, **network)
        memory.reseed(0)
        before = taught_values(agent, taught)
        for number in range(125):
            losses.append(agent.learn(memory, 32, updates=8).clone())
            if number % 10 == 0:
                agent.sync()
        values.append(taught_values(agent, taught))
        convolutions()
    its_losses, mine = torch.stack(losses).split(125)
    assert (mine - its_losses).abs().mean() < 0.1 * its_losses.mean()
    moved = (values[0] - before).norm()
    assert (values[1] - values[0]).norm() < 0.1 * moved


@torch.no_grad()
def taught_values(agent, batch):
    """What the policy gives for the actions taken in the `batch`."""
    return agent.policy.distribution.means(chosen(batch.actions, agent.policy(batch.states)))


def test_graphs_choose_the_actions_of_the_plain_path_also_after_learning():
    options = {"dtype": torch.bfloat16, "learning_rate": 1e-3, "average_updates": 30}
    plain, fast = (Agent(4, CUDA, graphs=graphs, **options) for graphs in (False, True))
    memories = [ReplayMemory(600, 8, device=CUDA) for _ in range(2)]
    states = [torch.randint(0, 256, (n, 4, 84, 84), dtype=torch.uint8, device=CUDA) for n in (32, 10)]
    differ = False
    for number, row in enumerate(rows(100, 8)):
        for agent, memory in zip((plain, fast), memories, strict=True):
            memory.push(on(CUDA, row))
            if number > 50:
                agent.learn(memory, 32)
        if number % 10 == 9:
            for part in ("policy", "average"):  # in place, so that the graphs stay
                getattr(fast, part).load_state_dict(getattr(plain, part).state_dict())
            for some in states:
                by_average, by_policy = (plain.run(some, training, epsilon=0.0) for training in (False, True))
                assert np.array_equal(fast.run(some, epsilon=0.0), by_average)
                assert np.array_equal(fast.run(some, True, epsilon=0.0), by_policy)
                differ |= not np.array_equal(by_average, by_policy)
    assert differ, "either network may have acted"


@pytest.mark.parametrize("graphs", [False, True])
def test_the_learning_rate_falls_for_what_is_recorded_too(graphs):
    rates = {"learning_rate": 1e-3, "learning_rate_end_factor": 1e-4, "learning_rate_decay": 8}
    agent, memory = Agent(4, CUDA, graphs=graphs, **rates), ReplayMemory(600, 8, device=CUDA)
    for row in rows(50, 8):
        memory.push(on(CUDA, row))

    def moved() -> float:
        """How far one more update takes the weight that it takes furthest."""
        before = {name: weight.clone() for name, weight in agent.policy.state_dict().items()}
        agent.learn(memory, 32)
        return max((weight - before[name]).abs().max().item() for name, weight in agent.policy.state_dict().items())

    early = [moved() for _ in range(CudaGraph.WARM_UP + 3)]
    agent.run(torch.zeros(8, 4, 84, 84, dtype=torch.uint8, device=CUDA), training=True)
    assert min(early) > 1e-5 > 1e-6 > moved()


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("kind", [ReplayMemory, PrioritizedReplayMemory])
def test_neither_learning_nor_storing_waits_for_the_gpu(kind, graphs):
    agent = Agent(4, CUDA, double_dqn=True, dtype=torch.bfloat16, average_updates=50, graphs=graphs)
    memory = kind(600, 8, n_step=3, device=CUDA)
    stored = [on(CUDA, row) for row in rows(100, 8)]
    for row in stored[:50]:
        memory.push(row)
    for _ in range(CudaGraph.WARM_UP + 1 if graphs else 1):  # recording waits, and so may the first of anything
        agent.learn(memory, 32, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for row in stored[50:]:
            memory.push(row)
            agent.learn(memory, 32, 2)
        agent.sync()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("graphs", [False, True])
def test_states_and_rows_arrive_whole_on_the_gpu_however_busy_it_is(graphs):
    here, there = AtariEnv("breakout", 4), AtariEnv("breakout", 4, CUDA, graphs=graphs)
    agent, mine, its = Agent(4), [], []
    states, row = here.reset(3)
    its_states, its_row = there.reset(3)
    memories = [PrioritizedReplayMemory(1_000, 4, device=device, graphs=graphs) for device in ("cpu", CUDA)]
    for step in range(200):
        mine += [value.clone() for value in (states, *row)]
        its += [value.clone() for value in (its_states, *its_row)]
        memories[0].push(row)
        memories[1].push(its_row)
        if step == 100:  # in the middle of games, when a graph has been recorded
            (states, row), (its_states, its_row) = here.reset(4), there.reset(4)
            continue
        if step % 50 == 0:
            torch.cuda._sleep(1 << 30)  # half a second in which uploads wait for their turn
        actions = agent.run(states)
        (states, row), (its_states, its_row) = here.step(actions), there.step(actions)
    for one, other in zip(mine, its, strict=True):
        assert torch.equal(one, other.cpu())
    for one, other in zip(*(memory.gather(memory.sampleable()) for memory in memories), strict=True):
        assert torch.allclose(one, other.cpu())


@pytest.mark.parametrize(
    ("prioritized", "graphs", "precision", "storage"),
    [
        (False, True, "auto", "cuda"),
        (True, True, "auto", "cuda"),
        (True, False, "auto", "cuda"),
        (True, True, "float32", "cuda"),
        (True, True, "auto", "cpu"),  # the memory does not fit
        (False, True, "auto", "cpu"),
    ],
)
def test_a_whole_run_on_the_gpu_writes_its_results_and_goes_on_from_its_end(
    monkeypatch, tmp_path, capfd, prioritized, graphs, precision, storage
):
    constants = {
        "PRIORITIZED": prioritized,
        "CUDA_GRAPHS": graphs,
        "PRECISION": precision,
        "MAX_STEPS": 4_000,
        "WARM_STEPS": 1_000,
        "MEM_SIZE": 3_000,
        "EVALUATE_FREQ": 2_000,
        "EVAL_EPISODES": 2,
        "DEVICE": "cuda",
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(utils_machine, "free_bytes", lambda device: 10**12 * (device.type == storage))
    for name, value in constants.items():
        monkeypatch.setattr(main, name, value)
    for steps, rows_written in ((4_000, 3), (8_000, 5)):
        monkeypatch.setattr(main, "MAX_STEPS", steps)
        main.main()
        told = capfd.readouterr().err
        assert f"GB on {storage}, 1000.00 GB free" in told
        assert "CUDA graphs do not work" not in told
        assert len((tmp_path / "rewards.txt").read_text().splitlines()) == rows_written


def test_a_resumed_agent_and_a_reseeded_memory_go_on_by_graphs_as_without():
    outcomes = []
    for graphs in (False, True):
        options = {"average_updates": 20}
        agent, _, _ = trained(graphs, ReplayMemory, [1] * (CudaGraph.WARM_UP + 8), **options)
        twin = Agent(4, CUDA, double_dqn=True, graphs=graphs, **options)
        memory = ReplayMemory(600, 8, n_step=3, device=CUDA)
        for row in rows(60, 8):
            memory.push(on(CUDA, row))
        for _ in range(CudaGraph.WARM_UP + 2):  # its graph is recorded before the state comes
            twin.learn(memory, 32)
        twin.load_state_dict(agent.state_dict())
        for seed in (1, 2):
            memory.reseed([seed])
            for _ in range(CudaGraph.WARM_UP + 3):
                loss = twin.learn(memory, 32)
        outcomes.append((float(loss), memory.sample(8).indices.cpu(), twin.average.hidden.weight.detach().cpu()))
    assert outcomes[0][0] == pytest.approx(outcomes[1][0], rel=1e-3)
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    assert torch.allclose(outcomes[0][2], outcomes[1][2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("actions", [3, 9])
def test_a_dueling_network_whose_weights_begin_at_odd_places_learns_as_on_the_cpu(monkeypatch, actions):
    """In one flat tensor the layers behind the advantages' biases lie at no multiple of 16 bytes."""
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    weights = []
    for device in ("cpu", CUDA):
        memory = ReplayMemory(600, 8, n_step=3, device=device)
        for row in rows(60, 8):
            memory.push(on(device, row))
        batch = memory.gather(torch.arange(100, 132, device=device))
        batch = batch._replace(actions=batch.actions % actions)
        memory.sample = lambda batch_size, batches=1, batch=batch: batch
        agent = Agent(actions, device, dueling=True, learning_rate=1e-3, average_updates=30)
        for _ in range(CudaGraph.WARM_UP + 4):
            agent.learn(memory, 32)
        weights.append([parameter.detach().cpu() for parameter in agent.average.parameters()])
    for here, there in zip(*weights, strict=True):
        assert torch.allclose(here, there, rtol=0, atol=1e-4)


# The last test: a failed recording may leave torch in a strange state.
def test_where_recording_fails_learning_goes_on_without_graphs(capfd):
    class Waiting(ReplayMemory):
        """Waits for the device in every draw, which no graph can."""

        def sample(self, batch_size, batches=1):
            """Draw, and look."""
            batch = super().sample(batch_size, batches)
            batch.indices.max().item()
            return batch

    _, _, losses = trained(True, Waiting, [1] * (CudaGraph.WARM_UP + 5))
    assert losses.isfinite().all()
    assert capfd.readouterr().err.count("CUDA graphs do not work here") == 1
    assert torch.rand(1, device=CUDA).isfinite().all()  # the default generator, too, has left the recording
