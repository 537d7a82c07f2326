"""The replay memories against a naive twin that keeps whole episodes in lists and copies every stack out.

Frames are 2x2 pixels that spell (game, episode, time), so no two frames are alike and none is black.
"""

import gc
import io
import math

import numpy as np
import pytest
import torch
from test_sumtree import chi_square_limit

from utils_memory import PrioritizedReplayMemory, ReplayMemory
from utils_types import FRAME_SHAPE, Transition

TINY = (2, 2)
GAMMA = 0.9  # far enough from 1 that a wrong power shows
MEMORIES = [ReplayMemory, PrioritizedReplayMemory]


# ---- the naive twin ----


class Episode:
    """One game from its first frame: frames[t + 1] is what actions[t] led to."""

    def __init__(self, start, first_frame):
        self.start = start  # the row of the first frame
        self.frames, self.actions, self.rewards, self.terminals = [first_frame], [], [], []

    def stack(self, time, stack_size):
        """The last `stack_size` frames up to `time`, zeros before the first, copied out."""
        frames = self.frames[max(0, time - stack_size + 1) : time + 1]
        return np.stack([np.zeros_like(frames[0])] * (stack_size - len(frames)) + frames)


class NaiveMemory:
    """Every episode of every game, for ever; what may be sampled is worked out from the promises each time."""

    def __init__(self, kept_rows, num_envs, stack_size, n_step, gamma):
        self.kept_rows, self.num_envs = kept_rows, num_envs
        self.stack_size, self.n_step, self.gamma = stack_size, n_step, gamma
        self.episodes = [[] for _ in range(num_envs)]
        self.rows = 0
        self.answers = {}

    def begin(self, game, frame):
        """A new game starts with this row."""
        self.episodes[game].append(Episode(self.rows, frame))

    def step(self, game, frame, action, reward, terminal):
        """The running game took one step in this row."""
        episode = self.episodes[game][-1]
        episode.frames.append(frame)
        episode.actions.append(action)
        episode.rewards.append(reward)
        episode.terminals.append(terminal)

    def sampleable(self):
        """Index -> (episode, time) of each transition whose stack is safe and whose n steps have been seen."""
        oldest = max(0, self.rows - self.kept_rows + self.stack_size - 1)
        found = {}
        for game, episodes in enumerate(self.episodes):
            for episode in reversed(episodes):
                if episode.start + len(episode.actions) < oldest:
                    break
                for time in range(len(episode.actions)):
                    row = episode.start + time
                    if oldest <= row and row + self.n_step < self.rows:
                        found[row * self.num_envs + game] = (episode, time)
        return dict(sorted(found.items()))

    def answer(self, index, episode, time):
        """(state, action, return, discount, possible next states) of one transition."""
        if index not in self.answers:
            total, terminal, taken = 0.0, False, 0
            while taken < self.n_step and not terminal and time + taken < len(episode.actions):
                total += self.gamma**taken * episode.rewards[time + taken]
                terminal = episode.terminals[time + taken]
                taken += 1
            following = [episode.stack(time + taken, self.stack_size)]
            if terminal:  # unused, but it has to be some stack of this game inside the window
                rows = range(episode.start + time + 1, episode.start + time + self.n_step + 1)
                following = [self.stack_at(index % self.num_envs, row) for row in rows]
            discount = 0.0 if terminal else self.gamma**taken
            state = episode.stack(time, self.stack_size)
            self.answers[index] = (state, episode.actions[time], total, discount, following)
        return self.answers[index]

    def stack_at(self, game, row):
        """The stack that a game showed in a row."""
        episode = next(each for each in reversed(self.episodes[game]) if each.start <= row)
        return episode.stack(row - episode.start, self.stack_size)


class RandomGames:
    """Games of random length, 1 to 50 steps, with lost lives; they end by game over or by truncation."""

    def __init__(self, naive, seed):
        self.naive, self.rng = naive, np.random.default_rng(seed)
        self.left = [0] * naive.num_envs

    def next_row(self):
        """Play one row, told to the naive memory and returned as the environment would."""
        rows = []
        for game in range(self.naive.num_envs):
            if self.naive.rows == 0 or self.left[game] == 0:
                self.left[game] = int(self.rng.integers(1, self.rng.choice([3, 12, 51])))
                rows.append(self.start(game))
            else:
                rows.append(self.advance(game))
        self.naive.rows += 1
        frames, actions, rewards, terminals, ages = zip(*rows, strict=True)
        return Transition(
            torch.from_numpy(np.stack(frames)),
            torch.tensor(actions),
            torch.tensor(rewards, dtype=torch.float32),
            torch.tensor(terminals),
            torch.tensor(ages),
        )

    def start(self, game):
        """A first frame. The action was ignored, so whatever stands beside it must not be read."""
        frame = picture(game, len(self.naive.episodes[game]), 0)
        self.naive.begin(game, frame)
        return frame, int(self.rng.integers(18)), self.rng.uniform(-1, 1), False, 0

    def advance(self, game):
        """One step of a running game."""
        episode = self.naive.episodes[game][-1]
        time = len(episode.frames)
        frame = picture(game, len(self.naive.episodes[game]) - 1, time)
        self.left[game] -= 1
        game_over = self.left[game] == 0 and self.rng.random() < 0.5
        terminal = bool(game_over or self.rng.random() < 0.08)
        action, reward = int(self.rng.integers(18)), float(np.float32(self.rng.uniform(-1, 1)))
        self.naive.step(game, frame, action, reward, terminal)
        return frame, action, reward, terminal, capped_age(time, self.naive.stack_size)


def picture(game, episode, time):
    """A 2x2 frame that no other moment of no other game shows."""
    return np.array([[game + 1, episode % 256], [episode // 256, time]], dtype=np.uint8)


def capped_age(time, stack_size):
    """The age of a row. With a stack of one it still has to tell a first frame from the others."""
    return min(time, max(stack_size - 1, 1))


def pair(kind, rows, num_envs, *, seed=0, stack_size=4, n_step=1, gamma=GAMMA, **options):
    """A memory of `rows` rows, the random games that fill it, and its twin."""
    memory = kind(
        rows * num_envs,
        num_envs,
        stack_size=stack_size,
        n_step=n_step,
        gamma=gamma,
        frame_shape=TINY,
        seed=seed,
        **options,
    )
    naive = NaiveMemory(rows, num_envs, stack_size, n_step, gamma)
    return memory, RandomGames(naive, seed), naive


def filled(kind, rows, num_envs, pushes, **options):
    """The same three after this many pushed rows."""
    memory, games, naive = pair(kind, rows, num_envs, **options)
    for _ in range(pushes):
        memory.push(games.next_row())
    return memory, games, naive


def assert_answers(batch, naive):
    """Everything in the batch is what the episodes say."""
    moments = naive.sampleable()
    answers = [naive.answer(index, *moments[index]) for index in batch.indices.tolist()]
    states, actions, returns, discounts, following = zip(*answers, strict=True)
    assert np.array_equal(batch.states.numpy(), np.stack(states))
    assert batch.actions.tolist() == list(actions)
    assert np.allclose(batch.returns.numpy(), returns, rtol=0, atol=2e-6)
    assert np.allclose(batch.discounts.numpy(), discounts, rtol=1e-6, atol=0)
    for given, allowed in zip(batch.next_states.numpy(), following, strict=True):
        assert any(np.array_equal(given, stack) for stack in allowed)


def test_two_rows_more_than_a_stack_and_a_window_always_leave_something_to_draw():
    memory = PrioritizedReplayMemory(4 + 3 + 2, 1, stack_size=4, n_step=3, frame_shape=(1, 1))
    for number, age in enumerate([0, 1, 2, *[3] * 20, 0, 0, 1, 2, *[3] * 20]):  # a game ends, and then all restart
        one = torch.ones(1, dtype=torch.int64)
        frame = torch.zeros(1, 1, 1, dtype=torch.uint8)
        memory.push(Transition(frame, one, torch.zeros(1), torch.tensor([number == 22]), age * one))
        if number > 9:
            memory.sample(4)


# ---- the differential test ----


@pytest.mark.parametrize("num_envs", range(1, 10))
@pytest.mark.parametrize("n_step", [1, 2, 3, 4, 5])
def test_memory_and_naive_twin_agree_on_every_slot(n_step, num_envs):
    rng = np.random.default_rng(10 * n_step + num_envs)
    for stack_size in (1, 2, 4):
        rows = stack_size + n_step + int(rng.choice([0, 1, rng.integers(2, 40)]))
        kind = MEMORIES[int(rng.integers(2))]
        options = {"stack_size": stack_size, "n_step": n_step, "seed": int(rng.integers(1000))}
        memory, games, naive = pair(kind, rows, num_envs, **options)
        for pushed in range(4 * rows + 50):
            memory.push(games.next_row())
            indices = memory.sampleable()
            assert indices.tolist() == list(naive.sampleable())
            assert len(memory) == min(pushed, rows) * num_envs
            if len(indices) and pushed % 3 == 0:
                batch = memory.gather(indices)
                assert torch.equal(batch.indices, indices)
                assert batch.weights.tolist() == [1.0] * len(indices)
                assert_answers(batch, naive)


def test_the_random_games_show_every_kind_of_ending():
    naive = pair(ReplayMemory, 500, 9, n_step=5, seed=1)[2]
    games = RandomGames(naive, seed=1)
    for _ in range(500):
        games.next_row()
    discounts = {round(naive.answer(index, *moment)[3], 6) for index, moment in naive.sampleable().items()}
    assert discounts == {0.0, *(round(GAMMA**k, 6) for k in range(1, 6))}
    lengths = {len(episode.actions) for episodes in naive.episodes for episode in episodes[:-1]}
    assert min(lengths) == 1
    assert max(lengths) == 50


@pytest.mark.parametrize("kind", MEMORIES)
def test_sample_delivers_what_gather_does_and_only_sampleable_slots(kind):
    memory, games, naive = pair(kind, 13, 3, n_step=3, seed=2)
    for pushed in range(120):
        memory.push(games.next_row())
        if pushed < 8:
            continue
        batch = memory.sample(32)
        drawn = batch.weights > 0
        assert drawn.float().mean() > 0.5
        assert set(batch.indices[drawn].tolist()) <= set(naive.sampleable())
        again = memory.gather(batch.indices[drawn])
        for name in ("states", "actions", "returns", "next_states", "discounts", "indices"):
            assert torch.equal(getattr(batch, name)[drawn], getattr(again, name)), name


@pytest.mark.parametrize(("capacity", "num_envs", "rows"), [(30, 3, 10), (31, 3, 11), (32, 3, 11), (10, 1, 10)])
def test_a_capacity_is_rounded_up_to_whole_rows(capacity, num_envs, rows):
    memory = ReplayMemory(capacity, num_envs, frame_shape=TINY)
    assert memory.capacity == rows * num_envs
    games = RandomGames(NaiveMemory(rows, num_envs, 4, 1, 0.99), seed=3)
    assert len(memory) == 0
    for _ in range(40):
        memory.push(games.next_row())
    assert len(memory) == rows * num_envs
    assert memory.sampleable().tolist() == list(games.naive.sampleable())


# ---- single cases, worked by hand ----


def play(kind, script, rewards, **options):
    """A memory after one game played from a script, with the frame of row r all r + 1.

    s a game's first frame, f a step, l a step that loses a life, o game over; a game cut short is followed by s.
    """
    memory = kind(options.pop("rows", len(script) + 10), 1, frame_shape=TINY, **options)
    age = 0
    for row, (letter, reward) in enumerate(zip(script, rewards, strict=True)):
        age = 0 if letter == "s" else age + 1
        memory.push(
            Transition(
                frames=torch.full((1, *TINY), row + 1, dtype=torch.uint8),
                actions=torch.tensor([row % 18]),
                rewards=torch.tensor([float(reward)]),
                terminals=torch.tensor([letter in "lo"]),
                ages=torch.tensor([min(age, 3)]),
            )
        )
    return memory


def top_pixels(stacks):
    """One number per frame of each stack: the row it came from, plus one; 0 for black."""
    assert (stacks == stacks[..., :1, :1]).all()
    return stacks[..., 0, 0].tolist()


def test_one_step_transitions_carry_the_action_and_reward_of_the_row_after():
    memory = play(ReplayMemory, "sfff", [0, 1, -1, 0.5], gamma=0.5)
    batch = memory.gather(memory.sampleable())
    assert batch.indices.tolist() == [0, 1, 2]
    assert batch.actions.tolist() == [1, 2, 3]
    assert batch.returns.tolist() == [1, -1, 0.5]
    assert batch.discounts.tolist() == [0.5] * 3
    assert top_pixels(batch.states) == [[0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3]]
    assert top_pixels(batch.next_states) == [[0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4]]


def test_n_step_return_discounts_each_reward_by_its_distance():
    memory = play(ReplayMemory, "sfffff", [0, 1, 1, 1, 0, 1], n_step=3, gamma=0.5)
    batch = memory.gather(memory.sampleable())
    assert batch.indices.tolist() == [0, 1, 2]
    assert batch.returns.tolist() == [1.75, 1.5, 1.25]
    assert batch.discounts.tolist() == [0.125] * 3
    assert top_pixels(batch.next_states) == [[1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]]


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_lost_life_ends_the_return_but_not_the_game(kind):
    memory = play(kind, "sflfff", [0, 1, 1, 1, 1, 1], n_step=3, gamma=0.5)
    batch = memory.gather(memory.sampleable())
    assert batch.indices.tolist() == [0, 1, 2]  # the state after the lost life is learnt from too
    assert batch.returns.tolist() == [1.5, 1, 1.75]
    assert batch.discounts.tolist() == [0, 0, 0.125]
    assert top_pixels(batch.states)[2] == [0, 1, 2, 3]
    assert top_pixels(batch.next_states)[2] == [3, 4, 5, 6]


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_truncated_game_bootstraps_from_its_true_last_frame(kind):
    memory = play(kind, "sfffsfff", [0, 1, 1, 1, 9, 1, 1, 1], n_step=3, gamma=0.5)
    batch = memory.gather(memory.sampleable())
    assert batch.indices.tolist() == [0, 1, 2, 4]  # not 3: the step to the next game's first frame
    assert batch.returns.tolist() == [1.75, 1.5, 1, 1.75]
    assert batch.discounts.tolist() == [0.125, 0.25, 0.5, 0.125]
    assert top_pixels(batch.next_states) == [[1, 2, 3, 4]] * 3 + [[5, 6, 7, 8]]


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_game_over_neither_bootstraps_nor_reaches_into_the_next_game(kind):
    memory = play(kind, "sffosfff", [0, 1, 1, 1, 9, 1, 1, 1], n_step=3, gamma=0.5)
    batch = memory.gather(memory.sampleable())
    assert batch.indices.tolist() == [0, 1, 2, 4]
    assert batch.returns.tolist() == [1.75, 1.5, 1, 1.75]
    assert batch.discounts.tolist() == [0, 0, 0, 0.125]


def test_a_stack_never_mixes_two_games():
    memory = play(ReplayMemory, "sfosffosf", [0] * 9)
    batch = memory.gather(memory.sampleable())
    assert batch.indices.tolist() == [0, 1, 3, 4, 5, 7]
    assert top_pixels(batch.states)[2:] == [[0, 0, 0, 4], [0, 0, 4, 5], [0, 4, 5, 6], [0, 0, 0, 8]]


def test_the_oldest_rows_retire_before_their_stacks_are_overwritten():
    script = "s" + "f" * 11
    memory = play(ReplayMemory, script, [0] * 12, rows=8)
    batch = memory.gather(memory.sampleable())
    assert batch.indices.tolist() == [7, 8, 9, 10]  # rows 4..11 are kept, 4..6 lack a frame, 11 lacks its next
    assert top_pixels(batch.states) == [[i - 2, i - 1, i, i + 1] for i in range(7, 11)]


def test_the_oldest_rows_retire_even_where_their_game_starts_there():
    memory = play(ReplayMemory, "sfffo" + "sffffff", [0] * 12, rows=8)
    assert memory.sampleable().tolist() == [7, 8, 9, 10]


# ---- what a memory is made of ----


@pytest.mark.parametrize("kind", MEMORIES)
def test_batches_have_the_promised_shapes_and_types(kind):
    memory = kind(100, 2, n_step=3)
    frames = torch.zeros((2, *FRAME_SHAPE), dtype=torch.uint8)
    for age in range(10):
        two = torch.full((2,), min(age, 3))
        memory.push(Transition(frames, two, two.float() / 3, two < 0, two))
    for batch in (memory.sample(5), memory.gather(torch.tensor([0, 1, 3, 2, 3]))):
        assert batch.states.shape == batch.next_states.shape == (5, 4, *FRAME_SHAPE)
        assert batch.states.dtype == batch.next_states.dtype == torch.uint8
        for name in ("actions", "indices"):
            assert getattr(batch, name).shape == (5,)
            assert getattr(batch, name).dtype == torch.int64
        for name in ("returns", "discounts", "weights"):
            assert getattr(batch, name).shape == (5,)
            assert getattr(batch, name).dtype == torch.float32
    assert memory.sampleable().dtype == torch.int64


@pytest.mark.parametrize("kind", MEMORIES)
def test_the_memory_owns_its_frames(kind):
    memory, games, naive = filled(kind, 20, 2, 15, seed=4)
    row = games.next_row()
    memory.push(row)
    row.frames.fill_(77)
    memory.push(games.next_row())
    batch = memory.gather(memory.sampleable())
    assert_answers(batch, naive)
    batch.states.fill_(88)
    assert_answers(memory.gather(memory.sampleable()), naive)


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_million_steps_need_at_most_7_3_gigabytes(kind):
    for num_envs in (1, 16, 64):
        needed = kind.needed_bytes(1_000_000, num_envs)
        assert 1_000_000 * math.prod(FRAME_SHAPE) <= needed <= 7.3e9


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize(
    ("capacity", "num_envs", "shape"), [(2000, 8, FRAME_SHAPE), (1999, 7, FRAME_SHAPE), (50_000, 3, TINY)]
)
def test_a_memory_allocates_what_it_says_it_needs(kind, capacity, num_envs, shape):
    before = tensor_bytes()
    memory = kind(capacity, num_envs, frame_shape=shape)
    allocated = sum(tensor_bytes().values()) - sum(before.values())
    assert allocated == pytest.approx(kind.needed_bytes(capacity, num_envs, frame_shape=shape), rel=2e-3)
    assert memory.capacity >= capacity


def tensor_bytes():
    """Address -> bytes of the storage behind every tensor that is alive in this process."""
    gc.collect()
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in alive}


# ---- uniform sampling ----


def test_uniform_draws_are_uniform_over_the_sampleable_slots():
    memory, _, naive = filled(ReplayMemory, 60, 3, 200, n_step=3, seed=5)
    slots = list(naive.sampleable())
    assert len(slots) < 0.9 * 3 * 60  # game ends leave holes, as they should for this test
    observed = dict.fromkeys(slots, 0)
    for _ in range(200):
        batch = memory.sample(1000)
        assert set(batch.weights.tolist()) <= {0.0, 1.0}
        indices, counts = batch.indices[batch.weights > 0].unique(return_counts=True)
        for index, count in zip(indices.tolist(), counts.tolist(), strict=True):
            observed[index] += count  # a KeyError here is a slot that must not be drawn
    counts = np.array(list(observed.values()))
    assert counts.sum() > 0.9 * 200_000
    expected = counts.sum() / len(slots)
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(len(slots) - 1)


def test_uniform_draws_are_not_stratified():
    memory, _, naive = filled(ReplayMemory, 60, 1, 60, seed=6)
    slots = list(naive.sampleable())
    variances = []
    for _ in range(300):
        batch = memory.sample(len(slots))
        counts = np.bincount(np.searchsorted(slots, batch.indices[batch.weights > 0].numpy()), minlength=len(slots))
        variances.append(counts.var())
    assert np.mean(variances) == pytest.approx(1, abs=0.15)  # of a Poisson count; equal slices would give 0.3


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_memory_with_one_transition_among_dead_rows_yields_only_that_one(kind):
    memory = play(kind, "s" * 20 + "sf" + "s" * 20, [0] * 42)
    assert memory.sampleable().tolist() == [20]
    drawn = []
    for _ in range(50):
        batch = memory.sample(32)
        assert set(batch.weights.tolist()) <= {0.0, 1.0}  # 0 where a uniform draw found no transition
        drawn += batch.indices[batch.weights > 0].tolist()
    assert set(drawn) == {20}
    assert kind is ReplayMemory or len(drawn) == 50 * 32


def test_a_uniform_memory_ignores_priorities():
    memory, _, _ = filled(ReplayMemory, 60, 2, 100, seed=7)
    same, _, _ = filled(ReplayMemory, 60, 2, 100, seed=7)
    indices = memory.sampleable()[:5]
    memory.update_priorities(indices, torch.zeros(5))
    memory.update_priorities(torch.tensor([0]), torch.tensor([100.0]))
    assert torch.equal(memory.sample(1000).indices, same.sample(1000).indices)
    assert torch.equal(memory.sampleable(), same.sampleable())


@pytest.mark.parametrize("kind", MEMORIES)
def test_the_seed_alone_decides_the_draws(kind):
    def draws(seed):
        memory = kind(120, 2, frame_shape=TINY, seed=seed)
        games = RandomGames(NaiveMemory(60, 2, 4, 1, GAMMA), seed=8)
        for _ in range(100):
            memory.push(games.next_row())
        return torch.cat([memory.sample(64).indices for _ in range(3)])

    torch.manual_seed(1)
    first = draws(0)
    torch.manual_seed(2)
    assert torch.equal(draws(0), first)
    assert not torch.equal(draws(1), first)


# ---- saving ----


@pytest.mark.parametrize("pushes", [0, 1, 7, 20, 55])
@pytest.mark.parametrize("kind", MEMORIES)
def test_a_saved_memory_comes_back_and_goes_on_alike(kind, pushes):
    memory, games, naive = filled(kind, 20, 3, pushes, n_step=2)
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    restored, *_ = filled(kind, 20, 3, 40, n_step=2, seed=1)  # what it held is forgotten
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert len(restored) == len(memory)
    for _ in range(30):
        row = games.next_row()
        memory.push(row)
        restored.push(row)
        assert restored.sampleable().tolist() == list(naive.sampleable())
        if len(naive.sampleable()):
            memory.reseed([5, 6])
            restored.reseed([5, 6])
            for mine, its in zip(memory.sample(40), restored.sample(40), strict=True):
                assert torch.equal(mine, its)


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize(("before", "after"), [(20, 50), (50, 20)])
def test_a_memory_that_is_not_full_goes_on_alike_in_a_larger_and_a_smaller_one(kind, before, after):
    memory, games, naive = filled(kind, before, 3, 10, n_step=2)
    restored, *_ = filled(kind, after, 3, 70, n_step=2, seed=1)  # what it held is forgotten
    restored.load_state_dict(memory.state_dict())
    for _ in range(7):  # until the smaller one begins to forget
        for each in (memory, restored):
            each.reseed([5, 6])
        mine, its = memory.sample(40, 2), restored.sample(40, 2)
        assert all(torch.equal(*values) for values in zip(mine, its, strict=True))
        for each in (memory, restored):
            each.update_priorities(mine.indices, mine.returns)
        row = games.next_row()
        memory.push(row)
        restored.push(row)
        assert restored.sampleable().tolist() == memory.sampleable().tolist() == list(naive.sampleable())


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize(("rows", "pushes"), [(30_000, 10), (1_000, 500), (1_000, 1_500)])
def test_a_saved_memory_takes_the_room_it_says_and_none_for_rows_it_does_not_have(kind, rows, pushes):
    memory, *_ = filled(kind, rows, 3, pushes)
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    says = kind.saved_bytes(3 * rows, 3, 3 * (pushes - 1), frame_shape=TINY)
    assert says <= file.tell() <= 1.02 * says + 10_000  # names, and what aligns them


def test_a_saved_memory_of_another_size_is_refused():
    memory, *_ = filled(ReplayMemory, 20, 3, 30)
    for rows, num_envs in ((21, 3), (20, 4)):
        other, *_ = filled(ReplayMemory, rows, num_envs, 5)
        with pytest.raises(ValueError, match="do not fit"):
            other.load_state_dict(memory.state_dict())


def test_another_seed_draws_another_sequence():
    memory, *_ = filled(ReplayMemory, 20, 3, 30)
    draws = []
    for seed in ([1, 2], [1, 3], [1, 2]):
        memory.reseed(seed)
        draws.append(memory.sample(40).indices.tolist())
    assert draws[0] == draws[2] != draws[1]


def test_an_error_that_is_not_a_number_leaves_the_tree_whole():
    memory, *_ = filled(PrioritizedReplayMemory, 20, 3, 30)
    indices = memory.sampleable()
    memory.update_priorities(indices, torch.full((len(indices),), math.nan))
    assert memory.priorities(indices).numpy() == pytest.approx(priority(1.0, memory.alpha))


# ---- priorities ----


def priority(td_error, alpha):
    """The priority that a TD error earns."""
    return (min(abs(td_error), 1) + 0.01) ** alpha


def all_indices(naive):
    """Every index there has ever been, and those of the next two rows."""
    return torch.arange((naive.rows + 2) * naive.num_envs)


def assert_priorities(memory, naive, expected):
    """`expected` (index -> priority) for the indices in it, exactly zero for every other."""
    indices = all_indices(naive)
    wanted = [expected.get(index, 0.0) for index in indices.tolist()]
    given = memory.priorities(indices).numpy()
    assert np.allclose(given, wanted, rtol=1e-6, atol=0)


def draw_shares(memory, draws=100_000):
    """Index -> how often it is drawn in one batch of this many stratified draws."""
    indices, counts = memory.sample(draws).indices.unique(return_counts=True)
    return dict(zip(indices.tolist(), counts.tolist(), strict=True))


def assert_drawn_by_priority(memory, naive, expected):
    """Each slot is drawn in proportion to `expected`; a stratified count is less than 2 off its share."""
    shares, total = draw_shares(memory), sum(expected.values())
    assert set(shares) <= set(expected) <= set(naive.sampleable())
    for index, value in expected.items():
        assert abs(shares.get(index, 0) - 100_000 * value / total) < 2


@pytest.mark.parametrize("num_envs", [1, 2, 5])
@pytest.mark.parametrize(("n_step", "stack_size"), [(1, 4), (3, 4), (5, 2), (2, 1)])
def test_priorities_live_exactly_as_long_as_their_transition_may_be_sampled(n_step, stack_size, num_envs):
    rows, alpha = stack_size + n_step + 6, 0.6
    options = {"stack_size": stack_size, "n_step": n_step, "alpha": alpha, "seed": 9 + num_envs}
    memory, games, naive = pair(PrioritizedReplayMemory, rows, num_envs, **options)
    rng = np.random.default_rng(0)
    expected = {}
    for _ in range(70):
        memory.push(games.next_row())
        alive = list(naive.sampleable())
        expected = {index: expected.get(index, priority(1, alpha)) for index in alive}
        assert_priorities(memory, naive, expected)
        if alive:
            errors = rng.normal(0, 0.8, len(alive)).astype(np.float32)
            some = {index: float(error) for index, error in zip(alive, errors, strict=True) if rng.random() < 0.4}
            strangers = rng.integers(0, (naive.rows + rows) * num_envs, 8).tolist()  # dead, waiting or still to come
            changes = [(index, 0.3) for index in strangers if index not in alive] + list(some.items())
            changes = [changes[i] for i in rng.permutation(len(changes))]
            if changes:
                indices, errors = zip(*changes, strict=True)
                memory.update_priorities(torch.tensor(indices), torch.tensor(errors))
            expected.update({index: priority(error, alpha) for index, error in some.items()})
            assert_priorities(memory, naive, expected)
    assert_drawn_by_priority(memory, naive, expected)


@pytest.mark.parametrize("alpha", [0.5, 0.6, 1.0, 0.0])
def test_a_priority_is_the_clipped_absolute_error_plus_a_little_to_the_power_of_alpha(alpha):
    memory, _, naive = filled(PrioritizedReplayMemory, 30, 1, 30, alpha=alpha, seed=10)
    errors = [0.0, 0.25, -0.25, 1.0, -1.0, 7.5, -1e6]
    indices = memory.sampleable()[: len(errors)]
    memory.update_priorities(indices, torch.tensor(errors))
    expected = [0.01**alpha, 0.26**alpha, 0.26**alpha] + [1.01**alpha] * 4
    assert memory.priorities(indices).tolist() == pytest.approx(expected, rel=1e-6)
    assert memory.priorities(indices).dtype == torch.float64
    everything = dict.fromkeys(naive.sampleable(), 1.01**alpha) | dict(zip(indices.tolist(), expected, strict=True))
    assert_drawn_by_priority(memory, naive, everything)


def test_new_priorities_do_not_grow_with_errors_seen():
    memory, games, naive = filled(PrioritizedReplayMemory, 30, 2, 40, alpha=0.5, seed=11)
    memory.update_priorities(memory.sampleable(), torch.full((len(memory.sampleable()),), 1e9))
    memory.push(games.next_row())
    memory.push(games.next_row())
    assert_priorities(memory, naive, dict.fromkeys(naive.sampleable(), 1.01**0.5))


def test_new_priorities_do_not_fall_with_errors_seen():
    memory, games, naive = filled(PrioritizedReplayMemory, 30, 2, 40, alpha=0.5, seed=12)
    old = memory.sampleable()
    memory.update_priorities(old, torch.zeros(len(old)))
    memory.push(games.next_row())
    expected = {index: 0.01**0.5 if index in old else 1.01**0.5 for index in naive.sampleable()}
    assert len(set(expected.values())) == 2
    assert_priorities(memory, naive, expected)


def test_late_priorities_do_not_land_on_the_newcomer():
    rows, num_envs = 12, 3
    memory, games, naive = filled(PrioritizedReplayMemory, rows, num_envs, 30, alpha=1.0, seed=13)
    drawn = memory.sample(64).indices
    for _ in range(2 * rows):
        memory.push(games.next_row())
        alive = set(naive.sampleable())
        before = memory.priorities(all_indices(naive))
        memory.update_priorities(drawn, torch.zeros(64))
        after = dict(enumerate(memory.priorities(all_indices(naive)).tolist()))
        for index, value in enumerate(before.tolist()):
            written = index in alive and index in drawn
            assert after[index] == pytest.approx(0.01 if written else value, rel=1e-6)
    assert not alive & set(drawn.tolist())
    assert_drawn_by_priority(memory, naive, dict.fromkeys(naive.sampleable(), 1.01))


def test_late_and_timely_priorities_for_one_place_do_not_disturb_each_other():
    rows, num_envs = 12, 2
    memory, _, naive = filled(PrioritizedReplayMemory, rows, num_envs, 40, alpha=1.0, seed=14)
    alive = memory.sampleable()
    for late_first in (True, False):
        groups = [alive - rows * num_envs, alive] if late_first else [alive, alive + rows * num_envs]
        errors = [torch.full((len(alive),), 0.5 if group is alive else 0.1) for group in groups]
        memory.update_priorities(torch.cat(groups), torch.cat(errors))
        assert_priorities(memory, naive, dict.fromkeys(alive.tolist(), 0.51))


def test_priorities_written_too_early_are_forgotten():
    memory, games, naive = filled(PrioritizedReplayMemory, 20, 2, 25, n_step=3, seed=15)
    waiting = torch.arange((naive.rows - 3) * 2, (naive.rows + 1) * 2)
    memory.update_priorities(waiting, torch.zeros(len(waiting)))
    for _ in range(6):
        assert_priorities(memory, naive, dict.fromkeys(naive.sampleable(), 1.01**0.5))
        memory.push(games.next_row())


def test_a_step_into_the_next_game_takes_no_priority():
    memory = play(PrioritizedReplayMemory, "sffsffosfff", [0] * 11)
    dead = torch.tensor([2, 6])
    memory.update_priorities(dead, torch.ones(2))
    assert memory.priorities(dead).tolist() == [0, 0]
    assert set(draw_shares(memory)) == {0, 1, 3, 4, 5, 7, 8, 9}


def test_duplicates_in_a_batch_count_once():
    memory, _, naive = filled(PrioritizedReplayMemory, 20, 2, 40, alpha=1.0, seed=16)
    alive = memory.sampleable()
    memory.update_priorities(alive, torch.full((len(alive),), 0.09))
    for repeats in (64, 500):
        memory.update_priorities(alive[[3] * repeats + [5] * repeats], torch.tensor([1.0] * repeats + [0.5] * repeats))
    expected = dict.fromkeys(alive.tolist(), 0.1) | {int(alive[3]): 1.01, int(alive[5]): 0.51}
    assert_priorities(memory, naive, expected)
    assert_drawn_by_priority(memory, naive, expected)
    memory.update_priorities(alive[[3] * 64], torch.full((64,), 0.09))
    assert_drawn_by_priority(memory, naive, expected | {int(alive[3]): 0.1})


def test_no_invalid_slot_is_ever_drawn():
    memory, games, naive = pair(PrioritizedReplayMemory, 9, 3, n_step=2, seed=17)
    rng = torch.Generator().manual_seed(0)
    for pushed in range(200):
        memory.push(games.next_row())
        alive = set(naive.sampleable())
        if not alive:
            continue
        batch = memory.sample(256)
        assert set(batch.indices.tolist()) <= alive
        memory.update_priorities(batch.indices, torch.randn(256, generator=rng) * (pushed % 5) / 4)
        assert float(batch.weights.max()) == 1
        assert float(batch.weights.min()) > 0


def test_prioritized_draws_are_stratified():
    memory, _, naive = filled(PrioritizedReplayMemory, 60, 1, 60, seed=18)
    slots = list(naive.sampleable())
    for _ in range(20):
        _, counts = memory.sample(3 * len(slots)).indices.unique(return_counts=True)
        assert counts.tolist() == [3] * len(slots)  # equal priorities: every slot in its own three slices


def test_independent_prioritized_draws_follow_the_priorities():
    memory, _, naive = filled(PrioritizedReplayMemory, 12, 1, 40, alpha=1.0, seed=19)
    alive = memory.sampleable()
    memory.update_priorities(alive, torch.linspace(0.1, 0.9, len(alive)))
    shares = memory.priorities(alive).numpy() / memory.priorities(alive).sum().item()
    draws = torch.cat([memory.sample(1).indices for _ in range(5000)])
    observed = np.array([int((draws == index).sum()) for index in alive])
    assert observed.sum() == 5000
    assert ((observed - 5000 * shares) ** 2 / (5000 * shares)).sum() < chi_square_limit(len(alive) - 1)
    assert set(naive.sampleable()) == set(alive.tolist())


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_weights_are_inverse_probabilities_to_the_power_of_beta_over_the_largest(beta):
    options = {"alpha": 0.7, "beta_start": beta, "beta_steps": 10**12, "seed": 20}
    memory, _, _ = filled(PrioritizedReplayMemory, 60, 2, 100, **options)
    alive = memory.sampleable()
    memory.update_priorities(alive, torch.linspace(-1.2, 1.2, len(alive)))
    batch = memory.sample(64)
    chances = memory.priorities(batch.indices) / memory.priorities(alive).sum()
    raw = (len(alive) * chances) ** -beta
    assert torch.allclose(batch.weights, (raw / raw.max()).float(), rtol=1e-5)
    assert float(batch.weights.max()) == pytest.approx(1, rel=1e-6)
    assert len(batch.weights.unique()) == (1 if beta == 0 else len(chances.unique()))


def test_each_of_several_batches_has_its_own_share_of_every_part_of_the_sum_and_its_own_largest_weight():
    memory, _, _ = filled(PrioritizedReplayMemory, 60, 2, 100, alpha=0.7, seed=26)
    alive = memory.sampleable()
    memory.update_priorities(alive, torch.linspace(0.1, 1.0, len(alive)))
    chances = memory.priorities(alive) / memory.priorities(alive).sum()
    slots, order = (alive % memory.capacity).sort()  # the tree's order
    ends = chances[order].cumsum(0)
    batch = memory.sample(16, 4)
    for part in range(4):
        mine = slice(16 * part, 16 * part + 16)
        wanted = memory.priorities(batch.indices[mine])
        wanted = (wanted / wanted.min()) ** -memory.read_statistics()["beta"]
        assert torch.allclose(batch.weights[mine], wanted.float(), rtol=1e-5)
        place = torch.searchsorted(slots, batch.indices[mine] % memory.capacity)
        sixteenths = torch.arange(16) / 16  # draw k of a batch lies somewhere in sixteenth k
        assert (ends[place] >= sixteenths - 1e-6).all()
        assert (ends[place] - chances[order][place] <= sixteenths + 1 / 16 + 1e-6).all()


@pytest.mark.parametrize("kind", MEMORIES)
def test_several_batches_are_drawn_as_often_from_every_slot_as_one(kind):
    memory, _, _ = filled(kind, 30, 2, 50, seed=27)
    alive = memory.sampleable()
    drawn = torch.cat([memory.sample(8, 5).indices for _ in range(2_000)])
    counts = (drawn[:, None] == alive).sum(0).double()
    expected = len(drawn) / len(alive)
    assert counts.sum() == len(drawn)
    assert ((counts - expected).abs() < 6 * expected**0.5).all()


def test_equal_priorities_weigh_one():
    memory, _, _ = filled(PrioritizedReplayMemory, 60, 2, 100, seed=21)
    assert memory.sample(64).weights.tolist() == [1.0] * 64


def test_beta_rises_linearly_with_steps_and_stays_at_one():
    memory, games, _ = pair(PrioritizedReplayMemory, 10, 3, beta_start=0.4, beta_steps=120)
    seen = []
    for _ in range(60):
        memory.push(games.next_row())
        seen.append(memory.read_statistics()["beta"])
    assert isinstance(seen[0], float)
    assert seen == pytest.approx([0.4 + 0.6 * min(1, 3 * pushed / 120) for pushed in range(60)])
    assert seen[0] == pytest.approx(0.4)  # the row from reset is no step
    assert seen[20] == pytest.approx(0.7)
    assert seen[40] == seen[-1] == 1


def test_weights_follow_beta_as_it_rises():
    memory, games, naive = pair(PrioritizedReplayMemory, 20, 2, alpha=1.0, beta_start=0.2, beta_steps=100, seed=22)
    for _ in range(70):
        memory.push(games.next_row())
        alive = list(naive.sampleable())
        if len(alive) < 2:
            continue
        memory.update_priorities(torch.tensor(alive), torch.linspace(0, 1, len(alive)))
        batch = memory.sample(32)
        chances = memory.priorities(batch.indices)
        wanted = (chances / chances.min()) ** -(0.2 + 0.8 * min(1, (naive.rows - 1) * 2 / 100))
        assert torch.allclose(batch.weights, wanted.float(), rtol=1e-5)


# ---- refusals ----


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize(
    "wrong",
    [{"capacity": 0}, {"capacity": -5}, {"num_envs": 0}, {"n_step": 0}, {"n_step": -1}, {"stack_size": 0}],
)
def test_sizes_below_one_are_refused(kind, wrong):
    sizes = {"capacity": 100, "num_envs": 2, "n_step": 1, "stack_size": 4} | wrong
    with pytest.raises(ValueError, match=str(*wrong.values())):
        kind(**sizes, frame_shape=TINY)


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_memory_that_cannot_hold_one_window_is_refused(kind):
    with pytest.raises(ValueError, match="too small"):
        kind(6 * 3, 3, stack_size=4, n_step=3, frame_shape=TINY)
    kind(6 * 3 + 1, 3, stack_size=4, n_step=3, frame_shape=TINY)  # rounded up to seven rows


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frames", torch.zeros(2, 2, 3, dtype=torch.uint8)),
        ("frames", torch.zeros(3, 2, 2, dtype=torch.uint8)),
        ("frames", torch.zeros(2, 1, 2, 2, dtype=torch.uint8)),
        ("frames", torch.zeros(2, 2, 2)),
        ("actions", torch.zeros(3, dtype=torch.int64)),
        ("actions", torch.zeros(2, 1, dtype=torch.int64)),
        ("actions", torch.zeros(2)),
        ("rewards", torch.zeros(1)),
        ("rewards", torch.zeros(2, dtype=torch.int64)),
        ("terminals", torch.zeros(1, dtype=torch.bool)),
        ("terminals", torch.zeros(2)),
        ("ages", torch.tensor(1)),
        ("ages", torch.ones(2)),
    ],
)
def test_a_row_of_the_wrong_shape_or_type_is_refused_and_leaves_no_trace(kind, field, value):
    memory, games, naive = filled(kind, 20, 2, 30, seed=23)
    good = games.next_row()
    with pytest.raises(ValueError, match=field):
        memory.push(good._replace(**{field: value}))
    memory.push(good)
    assert memory.sampleable().tolist() == list(naive.sampleable())
    assert_answers(memory.gather(memory.sampleable()), naive)


@pytest.mark.parametrize("kind", MEMORIES)
def test_sampling_is_refused_until_there_is_something_to_sample(kind):
    memory, games, naive = pair(kind, 20, 2, n_step=3, seed=24)
    while not naive.sampleable():
        assert len(memory.sampleable()) == 0
        with pytest.raises(ValueError, match="sampl"):
            memory.sample(4)
        memory.push(games.next_row())
    assert naive.rows == 4
    assert memory.sample(4).indices.shape == (4,)
