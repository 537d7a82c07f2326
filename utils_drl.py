"""Agent: epsilon-greedy actions and temporal-difference updates of a policy network against a target network."""

import copy
import os
from collections.abc import Iterable
from functools import partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam  # a torch.optim.Adam would import torch's compiler, which takes seconds

from utils_files import is_whole, write_whole
from utils_graph import Graphs
from utils_model import DQN, pixels
from utils_types import Batch


def chosen(actions: Tensor, outputs: Tensor) -> Tensor:
    """Those [B, n] of the `actions` [B] among the `outputs` [B, A, n]."""
    return outputs.gather(1, actions[:, None, None].expand(-1, 1, outputs.shape[2])).squeeze(1)


def flatten(parameters: Iterable[torch.nn.Parameter], gradients: bool = False) -> torch.nn.Parameter:
    """Move `parameters` of one type into one flat parameter, so that what is done to all of them is one operation.

    With `gradients` each gets one of zeros, which is a part of the flat one's, in its shape and memory layout.
    """
    parameters = list(parameters)
    flat = torch.nn.Parameter(parameters[0].new_empty(sum(parameter.numel() for parameter in parameters)))
    flat.requires_grad_(parameters[0].requires_grad)
    flat.grad = torch.zeros_like(flat) if gradients else None
    offset = 0
    for parameter in parameters:
        layout = parameter.shape, parameter.stride(), offset
        parameter.data = flat.detach().as_strided(*layout).copy_(parameter.detach())
        parameter.grad = flat.grad.as_strided(*layout) if gradients else None
        offset += parameter.numel()
    return flat


def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy each source into its target. On a GPU one call is one kernel only where types and layouts are the same."""
    alike: dict[tuple[torch.dtype, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        alike.setdefault((target.dtype, source.dtype), []).append((target, source))
    for pairs in alike.values():
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))


LARGEST_DRAW = 1024  # transitions that are drawn at once, 58 MB of frames
AVERAGED_SHARE = 0.1  # of all updates so far: the most that the average of the weights spans
STATISTICS = ("loss", "q_value", "td_error", "gradient_norm")  # of an update: means over its batch, TD errors unsigned


class Agent:
    """A DQN agent.

    `epsilon` goes linearly from `eps_start` to `eps_end` over the first `eps_decay` steps acted while training, and
    `learning_rate` to its `learning_rate_end_factor` over the first `learning_rate_decay` of them.

    `dtype` is the arithmetic of the networks' bodies: float32, bfloat16, or float64 for the whole agent. With bfloat16
    `policy` and `target` keep their parameters in float32, and a network of rounded copies computes for both; what
    Adam adds to a weight would often be lost in the rounding.

    `average` is the network that plays when the agent is not in training, and the one that is saved: an exponential
    average of the policy's weights over `average_updates` updates (Polyak and Juditsky 1992), and over a tenth of those
    there were while that is less, since a young network learns faster than its average could follow. What is learned
    does not depend on it. With at most one update the average is the policy itself.

    With `graphs`, acting and learning are CUDA graphs where the device is a GPU and the memory is on it; the numbers
    are those of the plain path. A tensor returned by `learn` is then valid until the next call.
    """

    def __init__(
        self,
        action_dim: int,
        device: torch.device | str = "cpu",
        *,
        stack_size: int = 4,
        learning_rate: float = 6.25e-5,
        learning_rate_end_factor: float = 1.0,
        learning_rate_decay: int = 1,
        adam_eps: float = 1.5e-4,
        eps_start: float = 1.0,
        eps_end: float = 0.1,
        eps_decay: int = 1_000_000,
        double_dqn: bool = False,
        dueling: bool = False,
        quantiles: int = 1,
        atoms: int = 1,
        v_max: float = 10.0,
        layer_norm: bool = False,
        dtype: torch.dtype = torch.float32,
        average_updates: float = 1,
        graphs: bool = True,
        seed: int = 0,
    ):
        self.action_dim, self.device, self.double_dqn = action_dim, torch.device(device), double_dqn
        self.eps_start, self.eps_end, self.eps_decay = eps_start, eps_end, eps_decay
        self.learning_rate_start, self.learning_rate_end = learning_rate, learning_rate * learning_rate_end_factor
        self.learning_rate_decay = learning_rate_decay
        self.shape = {"action_dim": action_dim, "stack_size": stack_size, "dueling": dueling, "quantiles": quantiles}
        self.shape |= {"atoms": atoms, "layer_norm": layer_norm} | ({"v_max": v_max} if atoms > 1 else {})
        self._graphs = Graphs(self.device, graphs)
        self._dtype = dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        with torch.random.fork_rng(devices=[]):  # torch's own stream on the CPU stays as it was
            torch.manual_seed(seed)
            self.policy, self.target = (DQN(**self.shape, dtype=exact).to(self.device) for _ in range(2))
            self._rounded = None if dtype == exact else DQN(**self.shape, dtype=dtype).to(self.device)
        self.target.requires_grad_(False)
        self._weights, self._targets = flatten(self.policy.parameters(), True), flatten(self.target.parameters())
        self._flat = {self.policy: self._weights, self.target: self._targets}
        rounded = [] if self._rounded is None else self._rounded.parameters()
        self._parts = [flatten(alike) for _, alike in groupby(rounded, key=lambda parameter: parameter.dtype)]
        self._gradients = [parameter.grad for parameter in self.policy.parameters()]
        self.sync()
        self.average_updates, self.average = average_updates, self.policy
        if average_updates > 1:
            self.average = copy.deepcopy(self.target)
            self._averages = self._flat[self.average] = flatten(self.average.parameters())
            self._averaged = torch.zeros((), dtype=exact, device=self.device)  # updates that the average has seen
        on_gpu = self.device.type == "cuda"
        self.adam_eps = adam_eps
        moments = {name: torch.zeros_like(self._weights, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        # On a GPU both lie there, since a graph would go on with the numbers that it was recorded with, in float64: 1 -
        # 0.999 in float32 is wrong by 1e-5, as are the first updates. Elsewhere the host reads them and must not wait.
        updates = torch.zeros((), dtype=torch.float64, device=self.device) if on_gpu else torch.zeros(())
        self._rate = torch.full_like(updates, learning_rate) if on_gpu else learning_rate
        self._adam = {**moments, "step": updates}  # what Adam keeps, by torch's names
        # Where the acting graphs look for states, by their number and the network that acts.
        self._acting: dict[tuple[int, DQN], Tensor] = {}
        self._rng = np.random.default_rng(seed)
        self._trained_steps = 0
        self._sums, self._summed = torch.zeros(len(STATISTICS), dtype=exact, device=self.device), 0

    @property
    def epsilon(self) -> float:
        """The probability of a random action now."""
        return self._annealed(self.eps_start, self.eps_end, self.eps_decay)

    @property
    def learning_rate(self) -> float:
        """Adam's learning rate now."""
        return self._annealed(self.learning_rate_start, self.learning_rate_end, self.learning_rate_decay)

    def _annealed(self, start: float, end: float, steps: int) -> float:
        """What goes linearly from `start` to `end` over the first `steps` of training, now."""
        done = min(self._trained_steps / steps, 1.0)
        return start + (end - start) * done

    def run(
        self,
        states: Tensor,
        training: bool = False,
        *,
        epsilon: float | None = None,
        rng: np.random.Generator | None = None,
    ) -> np.ndarray:
        """Epsilon-greedy actions [N] int64 for `states` [N, S, 84, 84] uint8. Fetching them is a wait for the device.

        In `training` the policy acts, and epsilon falls afterwards; else the average acts. An evaluation gives its own
        `epsilon` and `rng`, and leaves no trace.
        """
        epsilon = self.epsilon if epsilon is None else epsilon
        rng = self._rng if rng is None else rng
        explore = rng.random(len(states)) < epsilon
        actions = rng.integers(self.action_dim, size=len(states))
        if not explore.all():
            greedy = self._greedy(self.policy if training else self.average, states)
            actions = np.where(explore, actions, greedy.cpu().numpy())
        if training:
            self._trained_steps += len(states)
        return actions

    def _greedy(self, network: DQN, states: Tensor) -> Tensor:
        if not self._graphs.in_use:
            return self._best(network, states)
        key = len(states), network
        if key not in self._acting:
            self._acting[key] = torch.empty_like(states)
        fixed = self._acting[key].copy_(states)
        return self._graphs(key, partial(self._best, network, fixed))

    def _best(self, network: DQN, states: Tensor) -> Tensor:
        return self._values(network, states).argmax(1)

    def values(self, states: Tensor) -> Tensor:
        """Q values [N, A] of `states` [N, S, 84, 84] uint8, by the average, which plays evaluations and is saved."""
        return self._values(self.average, states)

    @torch.no_grad()
    def _values(self, network: DQN, states: Tensor) -> Tensor:
        return network.distribution.means(self._network(network)(states))

    def learn(self, memory, batch_size: int, updates: int = 1) -> Tensor:
        """`updates` updates, at least 1, each from its own `batch_size` transitions, whose priorities then follow the
        TD errors.

        They are drawn, and valued by the target network, in one go: it does not change in between, and a large forward
        pass costs less than many small ones. Returns the last loss, a scalar on the device, without waiting for it.
        """
        if isinstance(self._rate, Tensor):
            self._rate.fill_(self.learning_rate)
        else:
            self._rate = self.learning_rate
        most = max(LARGEST_DRAW // batch_size, 1)
        for done in range(0, updates, most):
            part = min(most, updates - done)
            key = memory, batch_size, part
            if self._graphs.in_use and memory.device.type == "cuda":
                loss = self._graphs(key, partial(self._learn, *key), [memory.generator])
            else:
                loss = self._learn(*key)
            self._summed += 1
        return loss

    def _learn(self, memory, batch_size: int, updates: int) -> Tensor:
        batch = memory.sample(batch_size, updates)
        batch = batch._replace(next_states=pixels(batch.next_states, self._dtype))  # once for both networks
        with torch.no_grad():
            next_outputs = self._network(self.target)(batch.next_states)
        td_errors = []
        for part in zip(*(values.split(batch_size) for values in (*batch, next_outputs)), strict=True):
            loss, q_values, errors = self._update(Batch(*part[:-1]), part[-1])
            td_errors.append(errors)
        memory.update_priorities(batch.indices, torch.cat(td_errors))
        # The last update speaks for all, so that this costs next to nothing.
        self._sums += torch.stack([loss, q_values.mean(), errors.abs().mean(), self._weights.grad.norm()])
        if self.average is not self.policy:
            self._follow(updates)
        return loss

    @torch.no_grad()
    def _follow(self, updates: int) -> None:
        """Let the average take in the policy as it is after `updates` more updates."""
        self._averaged += updates
        least = 1 - (1 - 1 / self.average_updates) ** updates
        share = (updates / (AVERAGED_SHARE * self._averaged)).clamp(least, 1.0)
        self._averages.lerp_(self._weights, share)

    def _update(self, batch: Batch, next_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of Adam, given the target network's `next_outputs`; loss, Q values [B], unweighted TD errors [B].

        In Double DQN (van Hasselt et al. 2016) the policy network chooses the next action that the target network
        values, else the target network does both.
        """
        network, distribution = self._network(self.policy), self.policy.distribution
        with torch.no_grad():
            choice = network(batch.next_states) if self.double_dqn else next_outputs
            following = chosen(distribution.means(choice).argmax(1), next_outputs)
        outputs = chosen(batch.actions, network(batch.states))
        losses, targets = distribution.losses(outputs, batch.returns, batch.discounts, following)
        loss = (batch.weights * losses).mean()
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        copy_all(self._gradients, gradients)
        self._weights.grad.clamp_(-1, 1)
        self._step()
        q_values = distribution.means(outputs.detach())
        return loss.detach(), q_values, q_values - targets

    @torch.no_grad()
    def _step(self) -> None:
        """One step of Adam (Kingma and Ba 2015)."""
        adam(
            [self._weights],
            [self._weights.grad],
            [self._adam["exp_avg"]],
            [self._adam["exp_avg_sq"]],
            [],
            [self._adam["step"]],
            lr=self._rate,
            beta1=0.9,
            beta2=0.999,
            eps=self.adam_eps,
            weight_decay=0.0,
            amsgrad=False,
            maximize=False,
            # The fused kernel gives a GPU's processors 65,536 weights each, and most have none: twice the time.
            fused=self.device.type == "cpu",
            foreach=False,
            capturable=self.device.type == "cuda",  # without graphs too: the other way rounds differently
        )

    def _network(self, network: DQN) -> DQN:
        """The one that computes for `network`: itself, or the rounded one with a fresh copy of its parameters."""
        if self._rounded is None:
            return network
        with torch.no_grad():
            exact = self._flat[network].split([len(part) for part in self._parts])
            for part, values in zip(self._parts, exact, strict=True):
                part.copy_(values)
        return self._rounded

    def sync(self) -> None:
        """Copy the policy network into the target network."""
        with torch.no_grad():
            self._targets.copy_(self._weights)

    def read_statistics(self) -> dict[str, float]:
        """STATISTICS since they were last read: means over the last update of each draw. Waits for the device.

        Empty if there was no update.
        """
        if not self._summed:
            return {}
        means = (self._sums / self._summed).tolist()
        self._sums.zero_()
        self._summed = 0
        return dict(zip(STATISTICS, means, strict=True))

    def is_finite(self) -> bool:
        """Whether every weight of the policy, and so of its average, is a number. Waits for the device."""
        return bool(self._weights.isfinite().all())

    def reseed(self, seed: int | list[int]) -> None:
        """Draw random actions from a new sequence from here on."""
        self._rng = np.random.default_rng(seed)

    def state_dict(self) -> dict:
        """All that an agent made alike needs to continue training, but its random state: views, not copies."""
        return {
            "policy": self.policy.state_dict(),
            "target": self.target.state_dict(),
            "adam": self._adam,
            "trained_steps": self._trained_steps,
            **({} if self.average is self.policy else {"average": self._averages.detach(), "averaged": self._averaged}),
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over `state`, from any device, in place: recorded graphs go on with the same tensors."""
        if self.average is not self.policy:
            copy_all([self._averages.detach(), self._averaged], [state["average"], state["averaged"]])
        self.policy.load_state_dict(state["policy"])
        self.target.load_state_dict(state["target"])
        for name, tensor in self._adam.items():
            tensor.copy_(state["adam"][name])
        self._trained_steps = state["trained_steps"]

    def save(self, path: str | os.PathLike, **about) -> None:
        """Write the average's weights, its shape and plain values `about` it; the file appears whole or not at all."""
        weights = {name: weight.cpu() for name, weight in self.average.state_dict().items()}  # loads on any machine
        write_whole(path, lambda file: torch.save({"about": about, "shape": self.shape, "weights": weights}, file))

    @classmethod
    def from_model(cls, path: str | os.PathLike, device: torch.device | str = "cpu", **options) -> tuple["Agent", dict]:
        """An agent with the network that `save` wrote, and what was saved `about` it. Raises as `read_model` does.

        `options` are those of the agent that do not shape its network; for a file that names no network, TypeError.
        """
        about, shape, weights = read_model(path, device)
        agent = cls(device=device, **shape, **options)
        agent._adopt(path, weights)
        return agent, about

    def load(self, path: str | os.PathLike) -> dict:
        """Load weights that `save` wrote into all networks and return what was saved `about` them.

        Raises as `read_model` does, and ValueError for a network of another shape.
        """
        about, shape, weights = read_model(path, self.device)
        if shape != self.shape:
            raise ValueError(f"{os.fspath(path)} holds a network of {shape}, this one is of {self.shape}")
        self._adopt(path, weights)
        return about

    def _adopt(self, path: str | os.PathLike, weights: dict[str, Tensor]) -> None:
        mine = self.policy.state_dict()
        if {name: weight.shape for name, weight in weights.items()} != {name: w.shape for name, w in mine.items()}:
            raise ValueError(f"{os.fspath(path)} holds weights that do not fit the network it names")
        self.policy.load_state_dict(weights)
        self.sync()
        self.average.load_state_dict(weights)
        if self.average is not self.policy:
            self._averaged.zero_()


def read_model(path: str | os.PathLike, device: torch.device | str = "cpu") -> tuple[dict, dict, dict[str, Tensor]]:
    """What `Agent.save` wrote: about the weights, their network's shape, and the weights on `device`.

    Only tensors and plain values are read: a file from a stranger runs no code. Raises ValueError for a file that is
    no model or is damaged, and OSError for one that cannot be read.
    """
    try:
        if not is_whole(path):
            raise ValueError("its checksums are not those of its parts")
        saved = torch.load(path, map_location=device, weights_only=True)
        weights = {name: weight.clone() for name, weight in saved["weights"].items()}  # raises for what is no tensor
        return saved["about"], saved["shape"], weights
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged file raises any of a dozen kinds
        raise ValueError(f"{os.fspath(path)} is not a model of this program, or it is damaged") from error
