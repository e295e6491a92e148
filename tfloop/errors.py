"""What can go wrong, as the user is told it: one line that names the thing, what was found, what to do."""


class UserError(ValueError):
    """A mistake in the input: a flag, a file, a combination. The command line prints it and exits with 2."""

    def __init__(self, message: str):
        super().__init__(message.replace("\n", " "))  # one line, whatever the input held


class WorkerLost(RuntimeError):
    """Another process of the cluster is gone. The command line prints it and exits with 4."""


class DivergenceError(ArithmeticError):
    """The loss or a gradient became NaN or infinite. The command line prints it and exits with 3.

    Attributes:
      step: global step at which it happened; that step's update was not made, so the weights are the last good ones.
      layer: name of the first layer whose weights, activations or gradients are not finite.
    """

    def __init__(self, message: str, step: int, layer: str):
        super().__init__(message)
        self.step, self.layer = step, layer
