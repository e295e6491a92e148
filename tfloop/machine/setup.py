"""One call that sets TensorFlow up for Python users as the commands do."""

import warnings
from typing import Any

from tfloop.config import Config
from tfloop.machine import devices
from tfloop.machine.devices import Machine


def start(batch_size: int = 64, **settings: Any) -> Machine:
    """Choose threads, oneDNN and the device for training; call it before TensorFlow is used.

    On a CPU each core then takes a part of the batch: operations have one thread each, so many run
    side by side, and a `Loop` cuts its batches to fit. TensorFlow's own choice is the other way
    round, every operation spread over all cores.

    Example:
      >>> import tfloop
      >>> tfloop.start(batch_size=64)  # first of all
      >>> loop = tfloop.Loop(state, data, batch_size=64)

    Args:
      batch_size: that of the loop to come; a small one is not worth parting.
      **settings: more of `Config`'s, such as device="cpu", intra_op_threads=2 or onednn="off".

    Returns:
      (config, device, replicas): the settings with what was chosen, and the device's name.

    Raises:
      UserError: a device that TensorFlow does not see, or settings that it does not take.
    """
    config = Config.make(batch_size=batch_size, **settings)
    machine = devices.start(config)
    found = machine.config
    wanted = devices.choose(config.replace(shards=found.shards), devices.cores())
    threads = (found.intra_op_threads, found.inter_op_threads)
    if machine.device == "CPU" and threads != (wanted.intra_op_threads, wanted.inter_op_threads):
        warnings.warn(
            f"tfloop.start() came too late: TensorFlow already runs with {threads[0]} threads in "
            f"an operation and {threads[1]} operations side by side (0: all cores); call it before "
            "anything else uses TensorFlow",
            stacklevel=2,
        )
    return machine
