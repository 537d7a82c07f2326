"""DQN: the network of Mnih et al. 2015, with the dueling head of Wang et al. 2016 and quantiles as options."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from utils_types import FRAME_SHAPE


class DQN(nn.Module):
    """Three convolutions without bias, one hidden layer, and `quantiles` values for each action.

    `dtype` is the arithmetic of the convolutions and the hidden layer; the parameters and the output layer keep the
    precision they are stored in, float32 unless the module was converted. Pixels 0..255 are exact in bfloat16, so the
    scaling by 1/255 is folded into the first convolution's weights.
    """

    def __init__(
        self,
        action_dim: int,
        *,
        stack_size: int = 4,
        dueling: bool = False,
        quantiles: int = 1,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.action_dim, self.quantiles, self.dtype = action_dim, quantiles, dtype
        self.conv1 = nn.Conv2d(stack_size, 32, kernel_size=8, stride=4, bias=False)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=4, stride=2, bias=False)
        self.conv3 = nn.Conv2d(64, 64, kernel_size=3, stride=1, bias=False)
        side = (((FRAME_SHAPE[0] - 8) // 4 + 1 - 4) // 2 + 1) - 2  # 84 -> 20 -> 9 -> 7
        self.hidden = nn.Linear(64 * side * side, 512)
        self.output = nn.Linear(512, action_dim * quantiles)  # the advantages, when dueling
        if dueling:
            self.value_hidden = nn.Linear(64 * side * side, 512)
            self.value_output = nn.Linear(512, quantiles)
        self.dueling = dueling
        for layer in self.children():
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Values [B, action_dim, quantiles] of uint8 `states` [B, S, 84, 84]."""
        cast = self.dtype
        x = F.relu(F.conv2d(states.to(cast), (self.conv1.weight / 255).to(cast), stride=4))
        x = F.relu(F.conv2d(x, self.conv2.weight.to(cast), stride=2))
        x = F.relu(F.conv2d(x, self.conv3.weight.to(cast))).flatten(1)
        values = self._head(x, self.hidden, self.output).unflatten(1, (self.action_dim, self.quantiles))
        if self.dueling:
            state_value = self._head(x, self.value_hidden, self.value_output).unsqueeze(1)
            values = state_value + values - values.mean(1, keepdim=True)
        return values

    def _head(self, x: Tensor, hidden: nn.Linear, output: nn.Linear) -> Tensor:
        x = F.relu(F.linear(x, hidden.weight.to(x.dtype), hidden.bias.to(x.dtype)))
        return output(x.to(output.weight.dtype))
