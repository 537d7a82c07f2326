"""SumTree: a Fenwick tree over priorities, exact and batched.

Node j of a Fenwick tree (Fenwick 1994, "A new data structure for cumulative frequency tables"; j counts from 1)
holds the sum of the leaves j - lowbit(j) + 1 .. j. Seen by level, the node for the block of 2^l leaves number b exists
where b is even, at j = (b + 1) * 2^l. That turns both walks into arithmetic on whole batches, one entry per level and
leaf.

Priorities are 64-bit fixed-point integers. Integer sums are exact whatever their order, so the tree never drifts, gives
the same numbers under atomic additions on a GPU, and cannot return a leaf of priority zero or one past the end.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FRACTION_BITS = 30  # fixed point: 2^30 is a priority of 1.0
ONE = 1 << FRACTION_BITS
LOADED = 1 << 16  # leaves that are loaded at once; they take room for every level


class SumTree:
    """Priorities of `capacity` leaves, with prefix sums and proportional sampling in O(log capacity).

    A priority above zero is rounded to a multiple of 2^-30 and is at least 2^-30. On the CPU every argument is checked
    and a ValueError names what is wrong; on other devices values are not looked at, since that would stall the device.

    With `scan`, leaves are found by adding all of them up anew instead of descending, and only the total is kept. That
    is O(capacity), but three operations where a descent is five for every level, and so the default on a GPU, where
    each is a kernel.
    """

    def __init__(self, capacity: int, device: torch.device | str = "cpu", scan: bool | None = None):
        if capacity < 1:
            raise ValueError(f"a SumTree needs a capacity of at least 1, not {capacity}")
        self.capacity = capacity
        self.device = torch.device(device)
        self.max_priority = ((1 << 63) - 1) // (capacity * ONE)  # a full tree of these still fits 64 bits
        self._scan = self.device.type == "cuda" if scan is None else scan
        self._depth = (capacity - 1).bit_length()
        self._levels = torch.arange(self._depth + 1, device=self.device)
        self._leaves = torch.zeros(capacity, dtype=torch.int64, device=self.device)
        # Sums of blocks, at the ends of the blocks; the last is the sum of all leaves, the only one that a scan needs.
        self._nodes = torch.zeros(1 if self._scan else (1 << self._depth) + 1, dtype=torch.int64, device=self.device)
        self._checked = self.device.type == "cpu"

    @staticmethod
    def needed_bytes(capacity: int) -> int:
        """Bytes a tree of this size allocates at most; with `scan` it is half of them or less."""
        return 8 * (capacity + (1 << (capacity - 1).bit_length()) + 1)

    def update(self, indices: Tensor, priorities: Tensor) -> None:
        """Set the priorities [B] of the leaves `indices` [B]. Of equal indices the last one wins and counts once."""
        if indices.shape != priorities.shape or indices.dim() != 1:
            raise ValueError(
                f"indices {list(indices.shape)} and priorities {list(priorities.shape)} must be equally long lists"
            )
        self._check_indices(indices)
        priorities = priorities.double()
        if self._checked:
            bad = ~((priorities >= 0) & (priorities <= self.max_priority))
            if bad.any():
                raise ValueError(f"a priority must be from 0 to {self.max_priority}, not {priorities[bad][0].item()}")
        leaves = (priorities * ONE).round().long().clamp_min(1) * (priorities > 0)
        self._assign(indices, leaves)

    def _assign(self, indices: Tensor, leaves: Tensor) -> None:
        order = torch.argsort(indices, stable=True)
        indices, leaves = indices[order], leaves[order]
        change = leaves - self._leaves[indices]
        change[:-1] *= indices[:-1] != indices[1:]  # of equal indices only the last changes anything
        self._leaves.index_add_(0, indices, change)
        if self._scan:
            self._nodes += change.sum()
            return
        blocks = indices[:, None] >> self._levels
        change = change[:, None] * (1 - (blocks & 1))  # odd blocks have no node of their own
        self._nodes.index_add_(0, ((blocks + 1) << self._levels).flatten(), change.flatten())

    def priorities(self, indices: Tensor | None = None) -> Tensor:
        """The priorities [B] float64 of the leaves `indices` [B], by default of all of them."""
        if indices is None:
            return self._leaves.double() / ONE
        self._check_indices(indices)
        return self._leaves[indices].double() / ONE

    def prefix_sum(self, index: int | Tensor) -> Tensor:
        """The sum, float64, of the first `index` leaves; `index` is a number or a tensor from 0 to capacity."""
        index = torch.as_tensor(index, device=self.device)
        self._check_indices(index, upper=self.capacity)
        if self._scan:
            return F.pad(self._leaves.cumsum(0), (1, 0))[index].double() / ONE
        blocks = index[..., None] >> self._levels
        return (self._nodes[blocks << self._levels] * (blocks & 1)).sum(-1).double() / ONE

    def total(self) -> Tensor:
        """The sum of all priorities, a float64 scalar."""
        return self._nodes[-1].double() / ONE

    def find(self, mass: Tensor) -> Tensor:
        """The leaves [B] int64 with prefix_sum(leaf) <= mass < prefix_sum(leaf + 1), for `mass` [B] in [0, total)."""
        if self._checked:
            bad = ~((mass >= 0) & (mass < self.total()))
            if bad.any():
                raise ValueError(
                    f"a mass must be from 0 to below the total {self.total().item()}, not {mass[bad][0].item()}"
                )
        return self._find((mass.double() * ONE).long())

    def _find(self, mass: Tensor) -> Tensor:
        """`find` in fixed point: halve the step from the root down, passing every sum that fits into the mass."""
        if self._scan:
            return torch.searchsorted(self._leaves.cumsum(0), mass, right=True)
        leaf = torch.zeros_like(mass)
        for level in reversed(range(self._depth)):
            right = leaf + (1 << level)
            below = self._nodes[right]
            fits = below <= mass
            leaf = torch.where(fits, right, leaf)
            mass = torch.where(fits, mass - below, mass)
        return leaf

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw one leaf from each of `batch_size` equal slices of the total (Schaul et al. 2016, appendix B.2.1).

        Returns indices [B] int64 and their probabilities [B] float64, priority / total.
        """
        if batch_size < 1:
            raise ValueError(f"a batch size must be at least 1, not {batch_size}")
        total = self._nodes[-1]
        if self._checked and total == 0:
            raise ValueError("nothing to sample: every priority in the tree is zero")
        draws = torch.rand(batch_size, dtype=torch.float64, generator=generator, device=self.device)
        slices = torch.arange(batch_size, device=self.device)
        mass = ((slices + draws) / batch_size * total).long()
        indices = self._find(torch.minimum(mass, total - 1))  # rounding may reach the total itself
        return indices, self._leaves[indices].double() / total

    def state_dict(self) -> dict[str, Tensor]:
        """All that a tree of at least the same capacity needs to continue exactly."""
        return {"leaves": self._leaves}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the priorities of `state`, of the first leaves if it has fewer; the sums follow exactly."""
        leaves = state["leaves"]
        if leaves.dim() != 1 or len(leaves) > self.capacity:
            raise ValueError(f"this tree has {self.capacity} leaves, the state has {list(leaves.shape)}")
        self._leaves.zero_()
        self._nodes.zero_()
        for begin in range(0, len(leaves), LOADED):
            part = leaves[begin : begin + LOADED].to(self.device)
            self._assign(torch.arange(begin, begin + len(part), device=self.device), part)

    def _check_indices(self, indices: Tensor, upper: int | None = None) -> None:
        if self._checked and indices.numel():
            upper = self.capacity - 1 if upper is None else upper
            low, high = indices.aminmax()
            if low < 0 or high > upper:
                raise ValueError(f"an index must be from 0 to {upper}, not {(low if low < 0 else high).item()}")
