"""DQN: the network of Mnih et al. 2015, and what the numbers that it gives for an action say about its return.

Options are the dueling head of Wang et al. 2016, layer norms, and distributions of the return instead of its mean.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from utils_types import FRAME_SHAPE

BLOCK = 4  # pixels: the first convolution's stride


def blocks(images: Tensor, dtype: torch.dtype) -> Tensor:
    """`images` [B, C, H, W] in `dtype`, each 4 x 4 block as one pixel: [B, 16 C, H / 4, W / 4], channels last.

    A convolution with a stride of 4 is one with a stride of 1 over these, and over its weights made the same way.
    """
    split = images.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).permute(0, 2, 4, 3, 5, 1)
    return split.to(dtype, memory_format=torch.contiguous_format).flatten(3).permute(0, 3, 1, 2)


def pixels(states: Tensor, dtype: torch.dtype) -> Tensor:
    """`states` [B, S, 84, 84] as the convolutions take them: in `dtype` (0..255 are exact in bfloat16), channels last.

    What is so already is returned as it is. Left in another layout, a convolution would convert it, and backward again.
    On a GPU they are in blocks, since for so few channels as S it has only slow kernels.
    """
    if states.is_cuda:
        return blocks(states, dtype) if states.shape[2:] == FRAME_SHAPE else states
    return states.to(dtype).contiguous(memory_format=torch.channels_last)


def quantile_loss(values: Tensor, targets: Tensor) -> Tensor:
    """Per-sample loss [B] of quantiles `values` [B, q] for `targets` [B, q] (Dabney et al. 2018, eq. 10, kappa = 1).

    Twice the paper's: with one quantile, whose fraction is 1/2, it is then exactly the smooth-L1 of the TD error.
    """
    quantiles = values.shape[1]
    above = torch.linspace(1 / quantiles, 2 - 1 / quantiles, quantiles, dtype=values.dtype, device=values.device)
    errors = targets[:, None, :] - values[:, :, None]  # [B, value, target]
    slope = torch.where(errors < 0, 2 - above[:, None], above[:, None])  # twice the fractions (2i + 1) / 2q
    losses = slope * F.smooth_l1_loss(errors, torch.zeros_like(errors), reduction="none")
    return losses.sum((1, 2)) / targets.shape[1]


class Quantiles:
    """Outputs that are equally likely returns (QR-DQN, Dabney et al. 2018); a single one is the Q value."""

    def means(self, outputs: Tensor) -> Tensor:
        """Q values [...] of `outputs` [..., q]."""
        return outputs.mean(-1) if outputs.shape[-1] > 1 else outputs.squeeze(-1)

    def losses(self, outputs: Tensor, returns: Tensor, discounts: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """Per-sample losses [B] and TD targets [B] of the Q values.

        `outputs` [B, q] are of the actions taken, `following` [B, q] of the best ones in the next states, and
        `returns` and `discounts` [B] lie between.
        """
        targets = returns[:, None] + discounts[:, None] * following
        return quantile_loss(outputs, targets), self.means(targets)


class Atoms(nn.Module):
    """Outputs that are logits of `count` returns, spaced from -`v_max` to `v_max` (C51, Bellemare et al. 2017)."""

    def __init__(self, count: int, v_max: float):
        super().__init__()
        self.count, self.v_max = count, v_max
        self.register_buffer("support", torch.linspace(-v_max, v_max, count, dtype=torch.float64), persistent=False)

    def means(self, outputs: Tensor) -> Tensor:
        """Q values [...] of `outputs` [..., count]."""
        return (outputs.softmax(-1) * self.support).sum(-1)

    def losses(self, outputs: Tensor, returns: Tensor, discounts: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """Per-sample losses [B], cross-entropies, and TD targets [B] of the Q values, none beyond `v_max`.

        `outputs` [B, count] are of the actions taken, `following` [B, count] of the best ones in the next states, and
        `returns` and `discounts` [B] lie between.
        """
        moved = (returns[:, None] + discounts[:, None] * self.support).clamp(-self.v_max, self.v_max)
        # The probability of an atom that has moved goes to its two neighbours, each by its nearness (algorithm 1).
        distances = (moved[:, None, :] - self.support[:, None]).abs() * ((self.count - 1) / (2 * self.v_max))
        shares = (1 - distances).clamp_min(0)  # [B, to, from]
        targets = (shares * following.softmax(1)[:, None, :]).sum(2)
        return -(targets * outputs.log_softmax(1)).sum(1), (targets * self.support).sum(1)


class DQN(nn.Module):
    """Three convolutions without bias, one hidden layer, and for each action the outputs that `distribution` reads.

    Those are `quantiles` returns, by default one, the Q value; or, with `atoms` above 1, which come first, the logits
    of so many returns from -`v_max` to `v_max`.

    `dtype` is the arithmetic of the convolutions and the hidden layer, and their parameters are stored in it; what
    follows is float32, or float64 when `dtype` is. The weights of the convolutions lie channels last in memory, and so
    do the activations: the hidden layer's columns count rows, then columns, then channels, not channels first.

    With `layer_norm` what enters the hidden layer, and its units before the rectifier, are normalised state by state
    (Ba et al. 2016). The scale of the weights before a norm says nothing then but how fast they learn, so all weights
    start with PyTorch's own, which are 0.4 of Kaiming's.
    """

    def __init__(
        self,
        action_dim: int,
        *,
        stack_size: int = 4,
        dueling: bool = False,
        quantiles: int = 1,
        atoms: int = 1,
        v_max: float = 10.0,
        layer_norm: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.action_dim, self.dueling, self.layer_norm = action_dim, dueling, layer_norm
        exact = torch.float32 if dtype == torch.bfloat16 else dtype
        self.outputs = atoms if atoms > 1 else quantiles  # for each action
        self.conv1 = nn.Conv2d(stack_size, 32, kernel_size=8, stride=BLOCK, bias=False)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=4, stride=2, bias=False)
        self.conv3 = nn.Conv2d(64, 64, kernel_size=3, stride=1, bias=False)
        side = (((FRAME_SHAPE[0] - 8) // 4 + 1 - 4) // 2 + 1) - 2  # 84 -> 20 -> 9 -> 7
        self.hidden = nn.Linear(64 * side * side, 512)
        self.norm = nn.LayerNorm(512) if layer_norm else None
        self.output = nn.Linear(512, action_dim * self.outputs)  # the advantages, when dueling
        if dueling:
            self.value_hidden = nn.Linear(64 * side * side, 512)
            self.value_norm = nn.LayerNorm(512) if layer_norm else None
            self.value_output = nn.Linear(512, self.outputs)
        for name, layer in self.named_children():
            if not layer_norm:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            layer.to(dtype=exact if name.endswith(("output", "norm")) else dtype, memory_format=torch.channels_last)
        self.distribution = Atoms(atoms, v_max).to(exact) if atoms > 1 else Quantiles()

    def forward(self, states: Tensor) -> Tensor:
        """Outputs [B, action_dim, outputs], for `distribution` to read, of uint8 `states` [B, S, 84, 84]."""
        weights = self.conv1.weight
        x = pixels(states, weights.dtype)
        x = F.relu(F.conv2d(x, blocks(weights, weights.dtype)) if x.is_cuda else self.conv1(x))
        x = F.relu(self.conv3(F.relu(self.conv2(x))))
        x = x.permute(0, 2, 3, 1).flatten(1)  # as it lies in memory, channels last: no copy
        # Without biases the scale of the pixels passes through to here, where there is the least to multiply. A norm
        # takes it away itself; x / 255 would be near its epsilon where a new network sees a nearly black screen.
        x = F.layer_norm(x, x.shape[1:]) if self.layer_norm else x / 255
        outputs = self._head(x, self.hidden, self.norm, self.output).unflatten(1, (self.action_dim, self.outputs))
        if self.dueling:
            state_value = self._head(x, self.value_hidden, self.value_norm, self.value_output).unsqueeze(1)
            outputs = state_value + outputs - outputs.mean(1, keepdim=True)
        return outputs

    def _head(self, x: Tensor, hidden: nn.Linear, norm: nn.LayerNorm | None, output: nn.Linear) -> Tensor:
        x = hidden(x).to(output.weight.dtype)
        return output(F.relu(x if norm is None else norm(x)))
