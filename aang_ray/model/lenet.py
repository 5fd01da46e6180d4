"""A small convolutional body for images, without heads.

Shape suffixes: E images, H height, W width, F features; 1 is the single colour channel.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

FEATURES = 64


class LeNet(nn.Module):
    """Two convolutions of stride 2 and a linear layer, as in the first LeNet (LeCun et al. 1989).

    It maps images [E, 1, H, W] to features [E, F]. Strides instead of pooling make a step on a CPU three times as fast.
    Weights have the variance for ReLU layers (He et al. 2015): with PyTorch's smaller default, plain SGD makes no
    progress for some hundred steps.
    """

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.hidden_size = FEATURES
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * math.ceil(height / 4) * math.ceil(width / 4), FEATURES),
            nn.ReLU(),
        )
        for layer in self.body:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, images_E1HW: Tensor) -> Tensor:
        features_EF: Tensor = self.body(images_E1HW.to(next(self.parameters()).dtype))
        return features_EF
