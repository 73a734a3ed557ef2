"""What happens to the sums of a convolution before they are stored, in one kernel with them.

    y = activation(scale * (x * w) + bias + residual)     residual "before" the activation
    y = activation(scale * (x * w) + bias) + residual     residual "after" it

scale and bias are one number per output channel; all is computed in the accumulator's type and rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

# By the names of torch.nn.functional; "gelu_tanh" is gelu(approximate="tanh").
ACTIVATIONS = ("relu", "relu6", "leaky_relu", "silu", "gelu", "gelu_tanh", "sigmoid", "hardswish")


class Epilogue(NamedTuple):
    """The default does nothing but add the bias, which is no part of it.

    `activation` is "" or one of ACTIVATIONS, `slope` the negative slope of leaky_relu; `residual` is "", "before" or
    "after"; `scale` says whether there is one. With `keep`, what the activation is applied to is written as well, to a
    second tensor like the output: backward needs it.
    """

    activation: str = ""
    slope: float = 0.01
    residual: str = ""
    scale: bool = False
    keep: bool = False


PLAIN = Epilogue()
