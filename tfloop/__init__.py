"""tfloop: a TensorFlow 2 training loop that one can read, step through, reset and measure.

Example:
  >>> import tfloop
  >>> data = tfloop.load("mnist")
  >>> config = tfloop.Config.make(epochs=5)
  >>> loop = tfloop.make_loop(config)
  >>> for record in loop.run(epochs=5):
  ...     print(record)

Names are loaded on first use, so that importing tfloop does not import TensorFlow.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tfloop.version import __version__ as __version__

if TYPE_CHECKING:
    from tfloop.assembly import make_loop as make_loop
    from tfloop.assembly import make_state as make_state
    from tfloop.config import PRESETS as PRESETS
    from tfloop.config import Config as Config
    from tfloop.data.arrays import from_arrays as from_arrays
    from tfloop.data.augmentation import Augmentation as Augmentation
    from tfloop.data.dataset import Dataset as Dataset
    from tfloop.data.dataset import Split as Split
    from tfloop.data.dataset import Standardizer as Standardizer
    from tfloop.data.pipelines import Batch as Batch
    from tfloop.data.sources import load as load
    from tfloop.data.stream import from_dataset as from_dataset
    from tfloop.errors import DivergenceError as DivergenceError
    from tfloop.errors import UserError as UserError
    from tfloop.inspection import checks as checks
    from tfloop.inspection import debugger
    from tfloop.inspection.plots import LivePlot as LivePlot
    from tfloop.inspection.summaries import Summaries as Summaries
    from tfloop.loop import Loop as Loop
    from tfloop.machine.setup import start as start
    from tfloop.metrics import Loss as Loss
    from tfloop.metrics import Metrics as Metrics
    from tfloop.optimizers import Optimizer as Optimizer
    from tfloop.records import Call as Call
    from tfloop.records import Epoch as Epoch
    from tfloop.schedules import Schedule as Schedule
    from tfloop.state import TrainState as TrainState
    from tfloop.step import example_losses as example_losses
    from tfloop.step import forward_and_backward as forward_and_backward
    from tfloop.step import losses as losses
    from tfloop.step import train_step as train_step
    from tfloop.training.checkpoints import Checkpoints as Checkpoints
    from tfloop.training.predictions import predict as predict
    from tfloop.training.saved_run import open_run as open_run
    from tfloop.training.session import train as train

    debug = debugger

_HOME = {
    "Augmentation": "data.augmentation",
    "Batch": "data.pipelines",
    "Call": "records",
    "Checkpoints": "training.checkpoints",
    "Config": "config",
    "Dataset": "data.dataset",
    "DivergenceError": "errors",
    "Epoch": "records",
    "LivePlot": "inspection.plots",
    "Loop": "loop",
    "Loss": "metrics",
    "Metrics": "metrics",
    "Optimizer": "optimizers",
    "PRESETS": "config",
    "Schedule": "schedules",
    "Split": "data.dataset",
    "Standardizer": "data.dataset",
    "Summaries": "inspection.summaries",
    "TrainState": "state",
    "UserError": "errors",
    "example_losses": "step",
    "forward_and_backward": "step",
    "from_arrays": "data.arrays",
    "from_dataset": "data.stream",
    "load": "data.sources",
    "losses": "step",
    "make_loop": "assembly",
    "make_state": "assembly",
    "open_run": "training.saved_run",
    "predict": "training.predictions",
    "start": "machine.setup",
    "train": "training.session",
    "train_step": "step",
}
_MODULES = {"checks": "inspection.checks", "debug": "inspection.debugger"}
__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"tfloop.{_MODULES[name]}")
    if name not in _HOME:
        raise AttributeError(f"module 'tfloop' has no attribute '{name}'")
    return getattr(importlib.import_module(f"tfloop.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
