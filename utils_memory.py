"""Replay memories that keep every frame once, on whatever device has room.

The memory is a ring of rows. A row is one step of all N games: each game's newest 84x84 frame, how many earlier
frames of the same game precede it (its age), and the action, reward and terminal flag of the step that starts there.
Rows are numbered from 0 without end and row r lies at r % rows; the transition of row r and game i has the index
r * N + i, which is never reused, and lies in slot index % capacity. A game's previous frame is N slots earlier, so a
stack is a gather over index - k * N, black where k exceeds the age.

A transition may be sampled while its whole stack and its n-step window are there. Of a full ring that leaves out the
`stack_size - 1` oldest rows, whose stacks the write head has begun to overwrite, and the `n_step` newest. It also
leaves out the step after a game's end: its action was ignored and led to another game's first frame (age 0).

All that the device's work depends on and that changes from step to step is a tensor on the memory's device. Where that
is the learner's device, push, sample, gather and update_priorities do not wait for it; a memory in RAM beside a learner
on a GPU waits for each row and for the TD errors.
"""

import numpy as np
import torch
from torch import Tensor

from sumtree import SumTree
from utils_graph import Graphs
from utils_types import FRAME_SHAPE, Batch, Transition

ROW_DTYPES = {"actions": torch.int64, "rewards": torch.float32, "terminals": torch.bool, "ages": torch.int64}
BESIDE = 7  # bytes of a slot beside its frame: age 1, action 1, reward 4, terminal 1
RING = ("frames", "ages", "actions", "rewards", "terminals")  # what is stored for every slot
PART = 1 << 13  # slots that are saved at once, 58 MB of frames
TRIES = 4  # candidates per uniform draw; all four miss less than once in 10^8 draws, unless games last a few steps


def words(values: Tensor) -> Tensor:
    """Rows of bytes as rows of 8-byte numbers, if they divide: to copy by index goes number by number."""
    return values.view(torch.int64) if values.dim() == 2 and values.shape[1] % 8 == 0 else values


class ReplayMemory:
    """Uniform replay over the last `capacity` steps of `num_envs` games (Mnih et al. 2015, methods).

    `capacity` is rounded up to whole rows. Batches are delivered on `learner_device`, by default the memory's own. With
    `graphs`, on a GPU, storing a row is a CUDA graph.
    Raises ValueError for sizes below 1 and for a capacity that cannot hold one stack and one n-step window per game.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        *,
        stack_size: int = 4,
        n_step: int = 1,
        gamma: float = 0.99,
        frame_shape: tuple[int, int] = FRAME_SHAPE,
        device: torch.device | str = "cpu",
        learner_device: torch.device | str | None = None,
        graphs: bool = True,
        seed: int = 0,
    ):
        for name, value in (
            ("capacity", capacity),
            ("num_envs", num_envs),
            ("stack_size", stack_size),
            ("n_step", n_step),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.rows = -(-capacity // num_envs)
        if self.rows < stack_size + n_step:
            least = (stack_size + n_step - 1) * num_envs + 1
            raise ValueError(
                f"a memory of {capacity} steps is too small for {num_envs} games: it needs at least {least}"
            )
        self.capacity = self.rows * num_envs
        self.num_envs, self.stack_size, self.n_step = num_envs, stack_size, n_step
        self.frame_shape = tuple(frame_shape)
        self.device = torch.device(device)
        self.learner_device = self.device if learner_device is None else torch.device(learner_device)

        # One frame more than slots: the last stays black, for stacks that reach back before their game's first frame.
        pixels = self.frame_shape[0] * self.frame_shape[1]
        self._frames = torch.zeros(self.capacity + 1, pixels, dtype=torch.uint8, device=self.device)
        self._ages = torch.zeros(self.capacity, dtype=torch.uint8, device=self.device)
        self._actions = torch.zeros(self.capacity, dtype=torch.uint8, device=self.device)
        self._rewards = torch.zeros(self.capacity, dtype=torch.float32, device=self.device)
        self._terminals = torch.zeros(self.capacity, dtype=torch.bool, device=self.device)

        self._pushed = 0  # rows
        self._count = torch.zeros((), dtype=torch.int64, device=self.device)  # the same, read by the device
        self._graphs = Graphs(self.device, graphs)
        # Where a row lies before it is stored: always in one place, for a graph to find.
        self._incoming = {name: torch.zeros_like(getattr(self, f"_{name}")[:num_envs]) for name in RING}
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._row = torch.arange(num_envs, device=self.device)
        self._ahead = torch.arange(n_step, device=self.device) * num_envs
        self._back = torch.arange(stack_size - 1, -1, -1, device=self.device)
        self._gammas = torch.tensor([gamma**k for k in range(n_step + 1)], device=self.device)

    @staticmethod
    def needed_bytes(capacity: int, num_envs: int, frame_shape: tuple[int, int] = FRAME_SHAPE) -> int:
        """Bytes a uniform memory of these sizes allocates."""
        slots = (-(-capacity // num_envs) + 1) * num_envs  # with the row that comes in
        return (slots + 1) * frame_shape[0] * frame_shape[1] + slots * BESIDE

    @staticmethod
    def saved_bytes(capacity: int, num_envs: int, steps: int, frame_shape: tuple[int, int] = FRAME_SHAPE) -> int:
        """Bytes of a uniform memory's state_dict after `steps` steps: only rows that are stored are written."""
        rows = min(-(-capacity // num_envs), -(-steps // num_envs) + 1)
        return rows * num_envs * (frame_shape[0] * frame_shape[1] + BESIDE)

    def __len__(self) -> int:
        """Steps stored."""
        return max(min(self._pushed - 1, self.rows), 0) * self.num_envs

    def push(self, row: Transition) -> None:
        """Append one row: first the one from `reset`, then one for every step. Raises ValueError for other shapes."""
        if row.frames.shape != (self.num_envs, *self.frame_shape) or row.frames.dtype != torch.uint8:
            raise ValueError(
                f"a row of frames must be uint8 {[self.num_envs, *self.frame_shape]}, "
                f"not {row.frames.dtype} {list(row.frames.shape)}"
            )
        for name, dtype in ROW_DTYPES.items():
            value = getattr(row, name)
            if value.shape != (self.num_envs,) or value.dtype != dtype:
                raise ValueError(
                    f"{name} of a row must be {dtype} [{self.num_envs}], not {value.dtype} {list(value.shape)}"
                )
        for name, incoming in self._incoming.items():
            incoming.copy_(getattr(row, name).reshape(incoming.shape))
        self._graphs("push", self._store)
        self._pushed += 1

    def _store(self) -> Tensor:
        """Write the row at the head of the ring, which the device finds by its own count; that count afterwards."""
        here = (self._count * self.num_envs + self._row) % self.capacity
        before = (here - self.num_envs) % self.capacity
        for name, incoming in self._incoming.items():
            slots = here if name in ("frames", "ages") else before
            words(getattr(self, f"_{name}")).index_copy_(0, slots, words(incoming))
        self._count += 1
        return self._count

    def sample(self, batch_size: int, batches: int = 1) -> Batch:
        """Draw `batches` * `batch_size` transitions, batch after batch, each equally likely, with replacement.

        Raises ValueError for a batch of none, and while not even one n-step window is stored.
        """
        self._check_sample(batch_size)
        first, last = self._window()
        draws = torch.rand(
            TRIES, batches * batch_size, dtype=torch.float64, generator=self.generator, device=self.device
        )
        candidates = first + (draws * (last - first)).long()
        found = self._is_transition(candidates)
        choice = found.byte().argmax(0, keepdim=True)  # the first try that hit a transition
        indices = candidates.gather(0, choice).squeeze(0)
        weights = found.gather(0, choice).squeeze(0).float()  # 0 where no try did
        return self._deliver(self.gather(indices)._replace(weights=weights))

    def gather(self, indices: Tensor) -> Batch:
        """The transitions `indices` [B], with weights of 1."""
        steps = indices[:, None] + self._ahead  # [B, n_step]
        rewards, terminals = self._at(self._rewards, steps), self._at(self._terminals, steps)
        # Step m is taken unless the life or game ended before it. A step to age 0 is one that a finished game ignored:
        # without a terminal before it that game was truncated, and the window ends early at its last picture.
        goes_on = self._is_transition(steps[:, 1:]) & ~terminals[:, :-1]
        taken = torch.cat([torch.ones_like(terminals[:, :1]), goes_on], dim=1).cumprod(1)
        length = taken.sum(1)
        over = (terminals & taken.bool()).any(1)
        both = self._stacks(torch.cat([indices, indices + length * self.num_envs]))
        return Batch(
            states=both[: len(indices)],
            actions=self._at(self._actions, indices).long(),
            returns=(rewards * taken * self._gammas[:-1]).sum(1),
            next_states=both[len(indices) :],
            discounts=self._gammas[length] * ~over,
            weights=torch.ones_like(rewards[:, 0]),
            indices=indices,
        )

    def sampleable(self) -> Tensor:
        """Every index [K] int64, ascending, that `sample` may return now."""
        first, last = self._window()
        indices = torch.arange(int(first), max(int(first), int(last)), device=self.device)
        return indices[self._is_transition(indices)]

    def update_priorities(self, indices: Tensor, td_errors: Tensor) -> None:
        """Uniform replay has no priorities."""

    def read_statistics(self) -> dict[str, float]:
        """Nothing to tell of uniform replay."""
        return {}

    def reseed(self, seed: int | list[int]) -> None:
        """Draw from a new random sequence from here on."""
        (number,) = np.random.SeedSequence(seed).generate_state(1, np.uint64)
        self.generator.manual_seed(int(number >> np.uint64(1)))

    def state_dict(self) -> dict:
        """All that a memory of the same sizes needs to continue, but its random state: views of what is stored."""
        views = {name: [torch.from_dlpack(part) for part in parts] for name, parts in self._parts(self._pushed).items()}
        return {"pushed": self._pushed, **views}  # torch.save writes a slice with all it was cut from, but not these

    def load_state_dict(self, state: dict) -> None:
        """Take over `state`, from any device, of a memory of the same size, or of any as long as none of both is full.

        Raises ValueError for another one; then nothing is sound.
        """
        for name, parts in self._parts(state["pushed"]).items():
            if [(part.shape, part.dtype) for part in parts] != [(part.shape, part.dtype) for part in state[name]]:
                raise ValueError(f"the {name} in the state do not fit a memory of {self.capacity} steps")
            for part, saved in zip(parts, state[name], strict=True):
                part.copy_(saved)
        self._ages[self._filled(state["pushed"]) :] = 0  # what is not written yet is no transition
        self._pushed = state["pushed"]
        self._count.fill_(self._pushed)

    def _parts(self, pushed: int) -> dict[str, tuple[Tensor, ...]]:
        """Views of the slots that `pushed` rows have filled."""
        return {name: getattr(self, f"_{name}")[: self._filled(pushed)].split(PART) for name in RING}

    def _filled(self, pushed: int) -> int:
        """How many slots `pushed` rows have filled."""
        return min(pushed, self.rows) * self.num_envs

    def _window(self) -> tuple[Tensor, Tensor]:
        """First and past-the-last index of the rows whose stacks and n-step windows are whole."""
        oldest = (self._count - self.rows + self.stack_size - 1).clamp_min(0)
        return oldest * self.num_envs, (self._count - self.n_step) * self.num_envs

    def _at(self, values: Tensor, indices: Tensor) -> Tensor:
        return values[indices % self.capacity]

    def _is_transition(self, indices: Tensor) -> Tensor:
        return self._at(self._ages, indices + self.num_envs) > 0

    def _stacks(self, indices: Tensor) -> Tensor:
        """Frame stacks [B, S, H, W] that end at `indices` [B], oldest frame first."""
        ages = self._at(self._ages, indices)
        sources = (indices[:, None] - self._back * self.num_envs) % self.capacity
        sources = torch.where(self._back <= ages[:, None], sources, self.capacity)
        return self._frames.index_select(0, sources.flatten()).view(-1, self.stack_size, *self.frame_shape)

    def _deliver(self, batch: Batch) -> Batch:
        if self.learner_device == self.device:
            return batch
        if self.learner_device.type == "cuda":  # pinned, so that the upload needs no wait
            return Batch(*(value.pin_memory().to(self.learner_device, non_blocking=True) for value in batch))
        return Batch(*(value.to(self.learner_device) for value in batch))

    def _check_sample(self, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"a batch size must be at least 1, not {batch_size}")
        if self._pushed <= self.n_step:
            raise ValueError(
                f"nothing to sample: {self._pushed} rows are stored, and a transition needs {self.n_step + 1}"
            )


class PrioritizedReplayMemory(ReplayMemory):
    """Proportional prioritized replay (Schaul et al. 2016, section 3.3), with priorities bounded by clipped TD errors.

    The priority of a transition is (min(|TD error|, 1) + 0.01) ** alpha. A new one gets the largest possible priority,
    a constant, so nothing grows for ever. Importance weights are (n * P(i)) ** -beta over their maximum in the batch,
    in which n cancels; beta goes linearly from `beta_start` to 1 while `beta_steps` steps are pushed.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        *,
        alpha: float = 0.5,
        beta_start: float = 0.4,
        beta_steps: int = 1_000_000,
        **kwargs,
    ):
        super().__init__(capacity, num_envs, **kwargs)
        self.alpha, self.beta_start, self.beta_steps = alpha, beta_start, beta_steps
        self._tree = SumTree(self.capacity, self.device)
        # What a push changes, counted from the row after it: the row whose stack it broke and the one it made whole.
        retired, ready = ((row * num_envs + self._row) for row in (self.stack_size - 2 - self.rows, -self.n_step - 1))
        self._changed = torch.cat([retired, ready])
        priorities = torch.tensor([0.0, (1.0 + 0.01) ** alpha], dtype=torch.float64, device=self.device)
        self._new_priorities = priorities.repeat_interleave(num_envs)

    @staticmethod
    def needed_bytes(capacity: int, num_envs: int, frame_shape: tuple[int, int] = FRAME_SHAPE) -> int:
        """Bytes a prioritized memory of these sizes allocates."""
        slots = -(-capacity // num_envs) * num_envs
        return ReplayMemory.needed_bytes(capacity, num_envs, frame_shape) + SumTree.needed_bytes(slots)

    @staticmethod
    def saved_bytes(capacity: int, num_envs: int, steps: int, frame_shape: tuple[int, int] = FRAME_SHAPE) -> int:
        """Bytes of a prioritized memory's state_dict after `steps` steps, with priorities of all slots."""
        leaves = 8 * -(-capacity // num_envs) * num_envs
        return ReplayMemory.saved_bytes(capacity, num_envs, steps, frame_shape) + leaves

    def _store(self) -> Tensor:
        """Write the row: another one's n-step window becomes whole and it gets priorities, a third loses its stack."""
        count = super()._store()
        # Before the ring is full, or the window complete, these are rows not yet written: no transition, priority 0.
        changed = count * self.num_envs + self._changed
        self._tree.update(changed % self.capacity, self._is_transition(changed) * self._new_priorities)
        return count

    def sample(self, batch_size: int, batches: int = 1) -> Batch:
        """Draw `batches` * `batch_size` transitions, batch after batch, in proportion to their priorities.

        One is drawn from each slice of the sum of priorities, and the slices are dealt to the batches in turn. Drawing
        many at once costs hardly more than drawing one. Raises ValueError as the uniform memory does.
        """
        self._check_sample(batch_size)
        slots, probabilities = self._tree.sample(batches * batch_size, self.generator)
        slots, probabilities = (dealt.view(batch_size, batches).t() for dealt in (slots, probabilities))
        weights = (probabilities / probabilities.amin(1, keepdim=True)) ** -self._beta()
        slots, weights = slots.flatten(), weights.flatten()
        oldest = (self._count - self.rows) * self.num_envs
        indices = oldest + (slots - oldest) % self.capacity
        return self._deliver(self.gather(indices)._replace(weights=weights.float()))

    def update_priorities(self, indices: Tensor, td_errors: Tensor) -> None:
        """Set the priorities of `indices` [B] from unweighted TD errors [B].

        An index that has left the memory, or is not sampleable for another reason, changes nothing. An error that is
        not a number counts as the largest: that training has diverged is for others to see, the tree must stay whole.
        """
        indices, td_errors = indices.to(self.device), td_errors.to(self.device)
        alive = self.priorities(indices) > 0
        priorities = (td_errors.double().nan_to_num(1.0).abs().clamp_max(1.0) + 0.01) ** self.alpha
        # Dead indices are pointed at the newest row, which always waits for its window with priority 0.
        newest = (self._count - 1) * self.num_envs
        self._tree.update(torch.where(alive, indices, newest) % self.capacity, torch.where(alive, priorities, 0.0))

    def priorities(self, indices: Tensor) -> Tensor:
        """The priorities [B] float64 of `indices` [B], 0 for those that may not be sampled."""
        first, last = self._window()
        there = (indices >= first) & (indices < last)
        return self._tree.priorities(indices % self.capacity) * there

    def read_statistics(self) -> dict[str, float]:
        """Beta, the priorities, and what is drawn by them now. Waits for the device.

        The effective sample size (Kish 1965) is the number of transitions if all were drawn equally often, and less the
        more some of them dominate. The mean age is that of the draws, in steps since they were stored.
        """
        priorities = self._tree.priorities()
        slots = torch.arange(self.capacity, device=self.device)
        ages = (self._count * self.num_envs - 1 - slots) % self.capacity
        total = priorities.sum()
        statistics = {
            "beta": self._beta(),
            "effective_sample_size": total**2 / (priorities**2).sum(),
            "largest_priority": priorities.max(),
            "mean_priority": total / (priorities > 0).sum(),
            "mean_age": (priorities * ages).sum() / total,
        }
        return dict(zip(statistics, torch.stack(list(statistics.values())).tolist(), strict=True))

    def state_dict(self) -> dict:
        """As of the uniform memory, with the priorities."""
        return {**super().state_dict(), "tree": self._tree.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """As of the uniform memory, with the priorities."""
        super().load_state_dict(state)
        self._tree.load_state_dict({"leaves": state["tree"]["leaves"][: self._filled(self._pushed)]})

    def _beta(self) -> Tensor:
        pushed = (self._count - 1).clamp_min(0) * self.num_envs
        return self.beta_start + (1.0 - self.beta_start) * (pushed.double() / self.beta_steps).clamp_max(1.0)
