"""DQN: the network of Mnih et al. 2015; options are the dueling head of Wang et al. 2016, quantiles and layer norms."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from utils_types import FRAME_SHAPE


def pixels(states: Tensor, dtype: torch.dtype) -> Tensor:
    """`states` [B, S, 84, 84] as the convolutions take them: in `dtype` (0..255 are exact in bfloat16), channels last.

    What is so already is returned as it is. Left in another layout, a convolution would convert it, and backward again.
    """
    return states.to(dtype).contiguous(memory_format=torch.channels_last)


class DQN(nn.Module):
    """Three convolutions without bias, one hidden layer, and `quantiles` values for each action.

    `dtype` is the arithmetic of the convolutions and the hidden layer, and their parameters are stored in it; what
    follows is float32, or float64 when `dtype` is. The weights of the convolutions lie channels last in memory.

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
        layer_norm: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.action_dim, self.quantiles, self.dueling, self.layer_norm = action_dim, quantiles, dueling, layer_norm
        self.conv1 = nn.Conv2d(stack_size, 32, kernel_size=8, stride=4, bias=False)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=4, stride=2, bias=False)
        self.conv3 = nn.Conv2d(64, 64, kernel_size=3, stride=1, bias=False)
        side = (((FRAME_SHAPE[0] - 8) // 4 + 1 - 4) // 2 + 1) - 2  # 84 -> 20 -> 9 -> 7
        self.hidden = nn.Linear(64 * side * side, 512)
        self.norm = nn.LayerNorm(512) if layer_norm else None
        self.output = nn.Linear(512, action_dim * quantiles)  # the advantages, when dueling
        if dueling:
            self.value_hidden = nn.Linear(64 * side * side, 512)
            self.value_norm = nn.LayerNorm(512) if layer_norm else None
            self.value_output = nn.Linear(512, quantiles)
        for name, layer in self.named_children():
            if not layer_norm:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            exact = name.endswith(("output", "norm")) and dtype == torch.bfloat16
            layer.to(dtype=torch.float32 if exact else dtype, memory_format=torch.channels_last)

    def forward(self, states: Tensor) -> Tensor:
        """Values [B, action_dim, quantiles] of uint8 `states` [B, S, 84, 84]."""
        x = pixels(states, self.conv1.weight.dtype)
        for convolution in (self.conv1, self.conv2, self.conv3):
            x = F.relu(convolution(x))
        x = x.permute(0, 2, 3, 1).flatten(1)  # in the order it lies in memory, or backward would go astray
        # Without biases the scale of the pixels passes through to here, where there is the least to multiply. A norm
        # takes it away itself, and would find x / 255 no larger than its own epsilon in the first, weak networks.
        x = F.layer_norm(x, x.shape[1:]) if self.layer_norm else x / 255
        values = self._head(x, self.hidden, self.norm, self.output).unflatten(1, (self.action_dim, self.quantiles))
        if self.dueling:
            state_value = self._head(x, self.value_hidden, self.value_norm, self.value_output).unsqueeze(1)
            values = state_value + values - values.mean(1, keepdim=True)
        return values

    def _head(self, x: Tensor, hidden: nn.Linear, norm: nn.LayerNorm | None, output: nn.Linear) -> Tensor:
        x = hidden(x).to(output.weight.dtype)
        return output(F.relu(x if norm is None else norm(x)))
