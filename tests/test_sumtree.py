"""SumTree against its naive twin: a plain array of integers and its cumulative sum.

Priorities are fixed-point multiples of UNIT, so every sum below 2**53 units is read back exactly and compared with ==.
"""

import io
import math

import numpy as np
import pytest
import torch

from sumtree import SumTree

UNIT = 2.0**-30  # the smallest priority above zero
CAPACITIES = [1, 2, 3, 5, 7, 8, 1000, 100_000, 2**17]
SMALL = [1, 2, 3, 5, 7, 8]


class NaiveTree:
    """The same promises kept in the most obvious way, in integer units."""

    def __init__(self, capacity):
        self.leaves = np.zeros(capacity, dtype=np.int64)

    def update(self, indices, priorities):
        """Write one value after the other, so that the last of several duplicates stays."""
        for index, priority in zip(indices, priorities, strict=True):
            self.leaves[index] = max(1, round(priority / UNIT)) if priority > 0 else 0

    def prefix_sums(self):
        """Sum of the first i leaves for every i in 0..capacity."""
        return np.concatenate([[0], np.cumsum(self.leaves)])

    def find(self, masses):
        """The index whose half-open interval of the cumulative sum holds each mass (in units)."""
        return np.searchsorted(np.cumsum(self.leaves), masses, side="right")


def units(values):
    """A float64 tensor of priorities or sums as exact integers."""
    scaled = np.asarray(values.to(torch.float64)) / UNIT
    assert np.array_equal(scaled, np.floor(scaled)), "not a whole number of units"
    return scaled.astype(np.int64)


def write(tree, naive, indices, priorities):
    """The same update to the tree and to its twin."""
    tree.update(torch.as_tensor(indices, dtype=torch.int64), torch.as_tensor(priorities, dtype=torch.float64))
    naive.update(indices, priorities)


def tree_of(leaves):
    """A tree holding these leaves, given in units."""
    tree = SumTree(len(leaves))
    tree.update(torch.arange(len(leaves)), torch.tensor(leaves, dtype=torch.float64) * UNIT)
    return tree


def random_priorities(rng, size, zero_share=0.2):
    """Priorities as replay memory writes them, with zeros and a few tiny ones among them."""
    priorities = rng.uniform(0.01, 1.01, size) ** 0.5
    priorities[rng.random(size) < 0.05] = 1e-12
    priorities[rng.random(size) < zero_share] = 0.0
    return priorities


def random_pair(capacity, seed, zero_share=0.2):
    """A tree filled with random priorities, at least one of them above zero, and its twin."""
    rng = np.random.default_rng(seed)
    tree, naive = SumTree(capacity), NaiveTree(capacity)
    priorities = random_priorities(rng, capacity, zero_share)
    priorities[rng.integers(capacity)] = 0.7
    write(tree, naive, np.arange(capacity), priorities)
    return tree, naive


def assert_same(tree, naive):
    """Leaves, total, every prefix sum and both sides of every boundary agree exactly."""
    prefix = naive.prefix_sums()
    capacity = len(naive.leaves)
    assert np.array_equal(units(tree.priorities(torch.arange(capacity))), naive.leaves)
    assert units(tree.total()) == prefix[-1]
    assert np.array_equal(units(tree.prefix_sum(torch.arange(capacity + 1))), prefix)
    filled = np.flatnonzero(naive.leaves)
    if len(filled):
        first, last = prefix[filled], prefix[filled + 1] - 1
        assert np.array_equal(tree.find(torch.from_numpy(first * UNIT)).numpy(), filled)
        assert np.array_equal(tree.find(torch.from_numpy(last * UNIT)).numpy(), filled)


def chi_square_limit(freedom):
    """The value a chi-square statistic exceeds once in 100,000 cases (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 4.265 * math.sqrt(spread)) ** 3


# ---- equality with the cumulative sum ----


@pytest.mark.parametrize("capacity", SMALL)
def test_find_agrees_with_the_cumulative_sum_for_every_mass_on_small_trees(capacity):
    rng = np.random.default_rng(capacity)
    patterns = [np.ones(capacity, dtype=np.int64), np.arange(1, capacity + 1)]
    patterns += [(np.arange(capacity) == lone).astype(np.int64) * 3 for lone in range(capacity)]
    patterns += list(rng.integers(0, 5, (60, capacity)))
    for leaves in patterns:
        if leaves.sum() == 0:
            continue
        tree = tree_of(leaves.tolist())
        masses = np.arange(leaves.sum())
        expected = np.repeat(np.arange(capacity), leaves)  # unit number m belongs to the leaf that holds it
        assert tree.find(torch.from_numpy(masses * UNIT)).tolist() == expected.tolist(), leaves
        assert tree.find(torch.from_numpy((masses + 0.5) * UNIT)).tolist() == expected.tolist(), leaves


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_sums_and_every_boundary_agree_with_the_cumulative_sum_after_random_updates(capacity):
    rng = np.random.default_rng(capacity)
    tree, naive = random_pair(capacity, seed=capacity)
    for _ in range(20):
        indices = rng.integers(0, capacity, 64)
        write(tree, naive, indices, random_priorities(rng, 64))
    assert_same(tree, naive)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_find_agrees_with_the_cumulative_sum_for_random_masses_and_just_below_each_boundary(capacity):
    tree, naive = random_pair(capacity, seed=capacity + 1)
    total = naive.prefix_sums()[-1]
    rng = np.random.default_rng(0)
    masses = rng.random(20_000) * total
    ends = naive.prefix_sums()[1:][naive.leaves > 0].astype(np.float64)
    below = np.nextafter(ends if len(ends) < 20_000 else rng.choice(ends, 20_000), 0)
    for mass in (masses, below):
        assert np.array_equal(tree.find(torch.from_numpy(mass * UNIT)).numpy(), naive.find(mass))


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_the_last_leaf_alone_is_found(capacity):
    tree = SumTree(capacity)
    tree.update(torch.tensor([capacity - 1]), torch.tensor([0.5]))
    assert tree.find(torch.tensor([0.0, 0.25, 0.5 - UNIT], dtype=torch.float64)).tolist() == [capacity - 1] * 3
    assert float(tree.prefix_sum(capacity - 1)) == 0
    assert float(tree.prefix_sum(capacity)) == 0.5


def test_a_new_tree_is_empty():
    tree = SumTree(6)
    assert tree.capacity == 6
    assert float(tree.total()) == 0
    assert tree.priorities(torch.arange(6)).tolist() == [0] * 6


def test_prefix_sum_takes_an_int_or_a_tensor():
    tree = tree_of([1, 2, 4])
    assert [units(tree.prefix_sum(i)) for i in range(4)] == [0, 1, 3, 7]
    assert units(tree.prefix_sum(torch.tensor([3, 0, 2]))).tolist() == [7, 0, 3]
    assert tree.prefix_sum(2).shape == ()
    assert tree.total().shape == ()


def test_results_have_the_promised_types():
    tree = tree_of([1, 2, 4])
    indices, probabilities = tree.sample(5, torch.Generator().manual_seed(0))
    assert indices.dtype == tree.find(torch.tensor([0.0], dtype=torch.float64)).dtype == torch.int64
    assert probabilities.dtype == tree.priorities(indices).dtype == tree.total().dtype == torch.float64
    assert tree.prefix_sum(1).dtype == torch.float64
    assert indices.shape == probabilities.shape == (5,)


# ---- exactness ----


@pytest.mark.parametrize("capacity", [7, 1000])
def test_a_million_duplicate_heavy_updates_leave_exact_sums(capacity):
    rng = np.random.default_rng(capacity)
    tree, leaves = SumTree(capacity), np.zeros(capacity)
    hot = rng.integers(0, capacity, 20)
    for _ in range(500):
        indices = np.where(rng.random(2000) < 0.9, rng.choice(hot, 2000), rng.integers(0, capacity, 2000))
        priorities = random_priorities(rng, 2000)
        tree.update(torch.from_numpy(indices), torch.from_numpy(priorities))
        leaves[indices] = priorities  # numpy keeps the last of several duplicates
    naive = NaiveTree(capacity)
    naive.update(range(capacity), leaves)
    assert_same(tree, naive)


def test_a_tree_emptied_after_many_updates_holds_exactly_nothing():
    rng = np.random.default_rng(5)
    tree = SumTree(1000)
    for _ in range(200):
        tree.update(torch.from_numpy(rng.integers(0, 1000, 500)), torch.from_numpy(rng.random(500)))
    tree.update(torch.arange(1000), torch.zeros(1000))
    assert float(tree.total()) == 0
    assert tree.prefix_sum(torch.arange(1001)).count_nonzero() == 0


def test_sums_do_not_depend_on_the_order_of_updates():
    priorities = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tree, shuffled = SumTree(1000), SumTree(1000)
    tree.update(torch.arange(1000), priorities)
    for indices in torch.randperm(1000, generator=torch.Generator().manual_seed(2)).split(37):
        shuffled.update(indices, priorities[indices])
    everywhere = torch.arange(1001)
    assert torch.equal(tree.prefix_sum(everywhere), shuffled.prefix_sum(everywhere))


def test_of_duplicates_the_last_value_wins_and_is_counted_once():
    tree = tree_of([8, 8, 8, 8, 8])
    tree.update(torch.tensor([3, 1, 3, 3]), torch.tensor([0.5, 0.25, 0.75, 0.125]))
    assert tree.priorities(torch.tensor([1, 3])).tolist() == [0.25, 0.125]
    assert units(tree.total()) == 3 * 8 + units(torch.tensor(0.375))
    tree.update(torch.full((1000,), 4), torch.linspace(0.001, 1, 1000))
    assert tree.priorities(torch.tensor([4])).tolist() == [1.0]
    assert units(tree.total()) == 2 * 8 + units(torch.tensor(1.375))


def test_duplicates_that_rewrite_the_present_value_change_nothing():
    tree, naive = random_pair(100, seed=9, zero_share=0)
    write(tree, naive, [42] * 64, [float(tree.priorities(torch.tensor([42])))] * 64)
    assert_same(tree, naive)


@pytest.mark.parametrize("tiny", [5e-324, 1e-300, 1e-30, 1e-10])
def test_a_tiny_priority_counts_as_one_unit_and_is_found(tiny):
    tree = SumTree(3)
    tree.update(torch.arange(3), torch.tensor([1.0, tiny, 1.0], dtype=torch.float64))
    assert units(tree.priorities(torch.tensor([1]))).tolist() == [1]
    assert tree.find(torch.tensor([1 - UNIT, 1, 1 + UNIT], dtype=torch.float64)).tolist() == [0, 1, 2]


def test_a_tree_of_tiny_priorities_alone_is_drawn_evenly():
    tree = SumTree(5)
    tree.update(torch.arange(5), torch.full((5,), 1e-20, dtype=torch.float64))
    indices, probabilities = tree.sample(5000, torch.Generator().manual_seed(0))
    assert torch.bincount(indices, minlength=5).tolist() == [1000] * 5
    assert torch.allclose(probabilities, torch.tensor(0.2, dtype=torch.float64))


def test_priorities_of_either_float_type_are_rounded_to_the_nearest_unit():
    values = torch.tensor([0.3, 1.01, 0.7, 2.5 * UNIT + 1e-11], dtype=torch.float64)
    for given in (values, values.float()):
        tree = SumTree(4)
        tree.update(torch.arange(4), given)
        expected = [round(value / UNIT) for value in given.tolist()]
        assert units(tree.priorities(torch.arange(4))).tolist() == expected


def test_half_of_the_largest_total_is_accepted_and_drawn_in_range():
    for capacity in (1, 3, 1000):
        tree = SumTree(capacity)
        tree.update(torch.arange(capacity), torch.full((capacity,), 2.0**32 / capacity, dtype=torch.float64))
        assert float(tree.total()) == pytest.approx(2.0**32, rel=1e-9)
        indices, _ = tree.sample(100_000, torch.Generator().manual_seed(0))
        assert int(indices.min()) >= 0
        assert int(indices.max()) == capacity - 1
        assert tree.find(tree.total().nextafter(torch.zeros((), dtype=torch.float64)).reshape(1)).item() < capacity


# ---- drawing ----


def test_a_million_independent_masses_land_in_proportion_to_priority():
    rng = np.random.default_rng(3)
    leaves = rng.integers(0, 40, 1000)  # some zero
    tree = tree_of(leaves.tolist())
    masses = torch.from_numpy(rng.random(1_000_000)) * tree.total()
    observed = np.bincount(tree.find(masses).numpy(), minlength=1000)
    assert observed[leaves == 0].sum() == 0
    expected = 1_000_000 * leaves / leaves.sum()
    statistic = ((observed - expected)[leaves > 0] ** 2 / expected[leaves > 0]).sum()
    assert statistic < chi_square_limit(np.count_nonzero(leaves) - 1)


def test_a_million_independent_draws_are_proportional_to_priority_inside_each_slice():
    slices, rounds = 500, 2000
    tree = tree_of([1, 2, 3, 4] * slices)  # slice i holds leaves 4i .. 4i+3
    generator = torch.Generator().manual_seed(4)
    observed = np.zeros(4 * slices)
    for _ in range(rounds):
        indices, _ = tree.sample(slices, generator)
        observed += np.bincount(indices.numpy(), minlength=4 * slices)
    expected = rounds * np.tile([0.1, 0.2, 0.3, 0.4], slices)
    assert (observed.reshape(slices, 4).sum(axis=1) == rounds).all()
    assert ((observed - expected) ** 2 / expected).sum() < chi_square_limit(3 * slices)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_every_leaf_gets_its_share_of_stratified_draws(capacity):
    tree, naive = random_pair(capacity, seed=capacity + 2)
    indices, _ = tree.sample(200_000, torch.Generator().manual_seed(5))
    share = 200_000 * naive.leaves / naive.leaves.sum()
    observed = np.bincount(indices.numpy(), minlength=capacity)
    assert np.abs(observed - share).max() < 2  # a leaf's interval cuts at most two slices


@pytest.mark.parametrize("capacity", [7, 1000, 100_000, 2**17])
def test_the_upper_half_is_drawn(capacity):
    tree = SumTree(capacity)
    tree.update(torch.arange(capacity), torch.ones(capacity))
    indices, _ = tree.sample(2 * capacity, torch.Generator().manual_seed(6))
    half = 1 << (capacity - 1).bit_length() - 1  # the largest power of two below the capacity
    assert int((indices >= half).sum()) == 2 * (capacity - half)
    assert torch.equal(torch.bincount(indices), torch.full((capacity,), 2))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 32, 777, 100_000])
@pytest.mark.parametrize("capacity", [1, 3, 8, 1000])
def test_each_slice_gets_one_draw(capacity, batch_size):
    tree, naive = random_pair(capacity, seed=7)
    indices, _ = tree.sample(batch_size, torch.Generator().manual_seed(8))
    prefix = naive.prefix_sums()
    edges = np.arange(batch_size + 1) * (prefix[-1] / batch_size)
    assert indices.shape == (batch_size,)
    assert (prefix[indices] < edges[1:] + 1).all()  # one unit of room for the rounding of the edges
    assert (prefix[indices + 1] > edges[:-1] - 1).all()


def test_one_draw_per_equal_leaf_is_every_leaf_in_order():
    tree = SumTree(1000)
    tree.update(torch.arange(1000), torch.ones(1000))
    assert torch.equal(tree.sample(1000, torch.Generator().manual_seed(9))[0], torch.arange(1000))


def test_probabilities_are_priority_over_total():
    tree, naive = random_pair(1000, seed=10)
    indices, probabilities = tree.sample(10_000, torch.Generator().manual_seed(11))
    expected = naive.leaves[indices.numpy()] / naive.leaves.sum()
    assert np.allclose(probabilities.numpy(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_zero_priority_is_never_drawn(capacity):
    rng = np.random.default_rng(capacity)
    tree = SumTree(capacity)
    kept, zeroed = np.split(rng.permutation(capacity), [max(1, capacity // 10)])
    tree.update(torch.from_numpy(kept), torch.full((len(kept),), 0.3))
    once = torch.from_numpy(zeroed[:1000])  # filled and emptied again
    for value in (1.0, 0.0):
        tree.update(once, torch.full((len(once),), value))
    generator = torch.Generator().manual_seed(12)
    for batch_size in (1, 32, 50_000):
        indices, probabilities = tree.sample(batch_size, generator)
        assert set(indices.tolist()) <= set(kept.tolist())
        assert (probabilities > 0).all()


def test_the_generator_decides_the_draws():
    tree, _ = random_pair(1000, seed=13)
    first, again, other = (tree.sample(64, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sampling_without_a_generator_works():
    indices, _ = tree_of([0, 3, 0]).sample(10)
    assert indices.tolist() == [1] * 10


# ---- saving ----


@pytest.mark.parametrize("capacity", [1, 7, 1000])
def test_a_saved_tree_comes_back_whole(capacity):
    tree, naive = random_pair(capacity, seed=14)
    file = io.BytesIO()
    torch.save(tree.state_dict(), file)
    file.seek(0)
    restored = SumTree(capacity)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert_same(restored, naive)
    draws = [each.sample(50, torch.Generator().manual_seed(15))[0] for each in (tree, restored)]
    assert torch.equal(*draws)
    write(restored, naive, [0, capacity - 1], [0.25, 0.5])
    assert_same(restored, naive)


def test_a_large_tree_comes_back_whole():
    tree = SumTree(200_000)
    tree.update(torch.arange(200_000), torch.rand(200_000, generator=torch.Generator().manual_seed(20)))
    restored = SumTree(200_000)
    restored.load_state_dict(tree.state_dict())
    assert torch.equal(restored.priorities(torch.arange(200_000)), tree.priorities(torch.arange(200_000)))
    assert torch.equal(restored.prefix_sum(torch.arange(200_001)), tree.prefix_sum(torch.arange(200_001)))


def test_a_restored_tree_shares_nothing_with_the_one_it_came_from():
    tree, naive = random_pair(10, seed=16)
    restored = SumTree(10)
    restored.load_state_dict(tree.state_dict())
    tree.update(torch.arange(10), torch.zeros(10))
    assert_same(restored, naive)


def test_loading_replaces_what_the_tree_held():
    tree, naive = random_pair(10, seed=17)
    other, _ = random_pair(10, seed=18)
    other.load_state_dict(tree.state_dict())
    assert_same(other, naive)


def test_a_state_of_more_leaves_is_refused():
    tree, naive = random_pair(8, seed=19)
    with pytest.raises(ValueError, match=r"8 leaves, the state has \[9\]"):
        tree.load_state_dict(SumTree(9).state_dict())
    assert_same(tree, naive)


@pytest.mark.parametrize("scan", [False, True])
def test_a_state_of_fewer_leaves_is_that_of_the_first(scan):
    tree, _ = random_pair(8, seed=19)
    larger = SumTree(21, scan=scan)
    larger.update(torch.arange(21), torch.ones(21))
    larger.load_state_dict(tree.state_dict())
    assert larger.priorities().tolist() == [*tree.priorities().tolist(), *[0.0] * 13]
    assert torch.equal(larger.prefix_sum(torch.arange(9)), tree.prefix_sum(torch.arange(9)))
    assert larger.total() == tree.total()


# ---- refusals ----


@pytest.mark.parametrize("capacity", [0, -3])
def test_a_capacity_below_one_is_refused(capacity):
    with pytest.raises(ValueError, match=str(capacity)):
        SumTree(capacity)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (-0.5, "-0.5"),
        (-1e-300, "-1e-300"),
        (1e30, r"1e\+30"),
    ],
)
def test_an_impossible_priority_is_refused_and_changes_nothing(bad, named):
    tree, naive = random_pair(8, seed=20)
    with pytest.raises(ValueError, match=named):
        tree.update(torch.tensor([0, 5, 2]), torch.tensor([0.1, bad, 0.2], dtype=torch.float64))
    assert_same(tree, naive)


@pytest.mark.parametrize("capacity", [1, 3, 1000, 2**17])
def test_a_priority_that_could_overflow_a_full_tree_is_refused(capacity):
    tree = SumTree(capacity)
    with pytest.raises(ValueError, match="priorit"):
        tree.update(torch.tensor([0]), torch.tensor([1.01 * 2.0**33 / capacity], dtype=torch.float64))
    assert float(tree.total()) == 0


@pytest.mark.parametrize("index", [11, 8, -1])
def test_an_index_out_of_range_is_refused_and_changes_nothing(index):
    tree, naive = random_pair(8, seed=21)
    with pytest.raises(ValueError, match=str(index)):
        tree.update(torch.tensor([0, index]), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match=str(index)):
        tree.priorities(torch.tensor([0, index]))
    assert_same(tree, naive)


@pytest.mark.parametrize("index", [9, -1])
def test_a_prefix_out_of_range_is_refused(index):
    tree, _ = random_pair(8, seed=22)
    with pytest.raises(ValueError, match=str(index)):
        tree.prefix_sum(index)
    with pytest.raises(ValueError, match=str(index)):
        tree.prefix_sum(torch.tensor([0, index]))


def test_lengths_that_differ_are_refused_and_change_nothing():
    tree, naive = random_pair(8, seed=23)
    for indices, priorities in (([0, 1, 2], [0.5, 0.5]), ([0, 1], [0.5])):
        with pytest.raises(ValueError, match=rf"{len(indices)}.*{len(priorities)}"):
            tree.update(torch.tensor(indices), torch.tensor(priorities))
    assert_same(tree, naive)


@pytest.mark.parametrize(("mass", "named"), [(3.0, "3"), (17.5, "17.5"), (-0.25, "-0.25"), (math.nan, "nan")])
def test_a_mass_outside_the_tree_is_refused(mass, named):
    tree = SumTree(5)
    tree.update(torch.arange(3), torch.ones(3))
    with pytest.raises(ValueError, match=named):
        tree.find(torch.tensor([0.5, mass], dtype=torch.float64))


def test_an_empty_tree_is_not_searched_or_drawn():
    tree = SumTree(5)
    with pytest.raises(ValueError, match=r"0|zero|empty"):
        tree.sample(4)
    with pytest.raises(ValueError, match="0"):
        tree.find(torch.tensor([0.0], dtype=torch.float64))


@pytest.mark.parametrize("batch_size", [0, -2])
def test_a_batch_size_below_one_is_refused(batch_size):
    with pytest.raises(ValueError, match=str(batch_size)):
        tree_of([1, 2]).sample(batch_size)


# ---- the other way to find leaves


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_scanning_finds_the_same_leaves_as_descending(capacity):
    rng = np.random.default_rng(capacity)
    descending, scanning = SumTree(capacity, scan=False), SumTree(capacity, scan=True)
    naive = NaiveTree(capacity)
    priorities = random_priorities(rng, capacity)
    priorities[rng.integers(capacity)] = 0.5
    write(scanning, naive, np.arange(capacity), priorities)
    descending.update(torch.arange(capacity), torch.as_tensor(priorities, dtype=torch.float64))
    sums = naive.prefix_sums()
    masses = np.unique(np.concatenate([sums[:-1], sums[1:] - 1]))
    masses = masses[(masses >= 0) & (masses < sums[-1])]
    found = scanning.find(torch.as_tensor(masses, dtype=torch.float64) * UNIT)
    assert np.array_equal(found, naive.find(masses))
    draws = [tree.sample(999, torch.Generator().manual_seed(capacity)) for tree in (descending, scanning)]
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    again = rng.integers(capacity, size=(2, 50))
    for tree in (descending, scanning):
        tree.update(torch.as_tensor(again[0]), torch.as_tensor(again[1], dtype=torch.float64) / 64)
    ends = torch.arange(capacity + 1)
    assert torch.equal(descending.prefix_sum(ends), scanning.prefix_sum(ends))
    assert descending.total() == scanning.total() == scanning.prefix_sum(capacity)
