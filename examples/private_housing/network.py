"""A network with one hidden layer of smooth units: its gradient changes little where its parameters change little."""
from torch import Tensor, nn


class OneHiddenLayer(nn.Module):
    """Softplus units between two linear layers.

    Args:
        units: in the hidden layer.
    """

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int, units: int = 16):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(input_shape[0], units), nn.Softplus(), nn.Linear(units, num_outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.layers(inputs)
        return found
