"""Storing and learning where nothing can be read: on torch's meta device, whose tensors are shapes without numbers.

A GPU is worth its price only if the host never waits for it. On the meta device it is an error to read a number or to
make a shape that depends on numbers, and so is here an operation on tensors of two devices, which on a GPU is an error
or a wait, and while storing and learning an upload, which would wait too (of `torch.tensor` no mode is told). This is
what can be shown of the CUDA path without a GPU; acting, graphs and the optimizer are for test_gpu.py.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import utils_memory
from sumtree import SumTree
from utils_drl import Agent
from utils_env import AtariEnv
from utils_memory import PrioritizedReplayMemory, ReplayMemory

META = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Allows operations only among tensors of one device, and from one device to another only where `uploads` are."""

    def __init__(self, uploads: bool = False):
        super().__init__()
        self.uploads = uploads

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        places = (args, kwargs) if self.uploads else (args, kwargs, result)
        devices = {leaf.device.type for leaf in tree_leaves(places) if isinstance(leaf, torch.Tensor)}
        assert len(devices) <= 1, f"{operation} works on tensors of {devices}"
        return result


class HostGenerator(torch.Generator):
    """A generator of the host, whichever device is asked for."""

    def __new__(cls, device):
        return super().__new__(cls)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    """The meta device has no generators of random numbers."""
    monkeypatch.setattr(torch, "Generator", HostGenerator)


@pytest.fixture(scope="module")
def env():
    """Two games, for all tests: a reset makes them as good as new."""
    return AtariEnv("breakout", 2, META, num_threads=1)


# What the agent does with a batch does not depend on the memory, so each of either is enough.
@pytest.mark.parametrize(
    ("kind", "scan", "options"),
    [
        (ReplayMemory, None, {}),
        (PrioritizedReplayMemory, False, {"layer_norm": True, "dtype": torch.bfloat16}),
        (PrioritizedReplayMemory, False, {"dueling": True, "quantiles": 5, "dtype": torch.bfloat16}),
        (PrioritizedReplayMemory, True, {"double_dqn": True, "dtype": torch.bfloat16, "average_updates": 50}),
        (PrioritizedReplayMemory, True, {"double_dqn": True, "dueling": True, "quantiles": 5}),
        (PrioritizedReplayMemory, True, {"double_dqn": True, "atoms": 51, "dtype": torch.bfloat16}),
    ],
    ids=["classic", "norm-bfloat16", "dueling-q5-bfloat16", "double-bfloat16", "double-dueling-q5", "atoms-bfloat16"],
)
def test_an_iteration_neither_waits_for_the_device_nor_mixes_devices(monkeypatch, env, kind, scan, options):
    monkeypatch.setattr(utils_memory, "SumTree", lambda capacity, device: SumTree(capacity, device, scan=scan))
    agent, memory = Agent(4, META, **options), kind(100, 2, n_step=3, device=META)
    with OneDevice(uploads=True):
        states, row = env.reset(0)
    for number in range(10):
        with OneDevice():
            memory.push(row)
            if number > 5:
                loss = agent.learn(memory, 8, 2)
        with OneDevice(uploads=True):
            states, row = env.step([number % 4] * 2)
    with OneDevice():
        agent.sync()
        best = agent.values(states).argmax(1)
    assert (best.shape, best.device.type, loss.shape, loss.device.type) == ((2,), "meta", (), "meta")


@pytest.mark.parametrize("read", [bool, float, torch.Tensor.item, torch.nonzero, lambda x: x[x > 0], torch.Tensor.cpu])
def test_waits_are_told(read):
    with pytest.raises(RuntimeError):
        read(torch.ones((), device=META))


@pytest.mark.parametrize(
    "mix",
    [
        lambda: torch.ones(3, device=META)[torch.arange(2)].add_(1),
        lambda: torch.ones(3).to(META),
        lambda: torch.as_tensor(np.ones(3)).to(META),
    ],
)
def test_mixtures_and_uploads_are_told(mix):
    with OneDevice(), pytest.raises(AssertionError, match="works on tensors of"):
        mix()
