"""Devices, threads and memory through tf.config, and a quiet start of TensorFlow."""

import contextlib
import os
import sys
import tempfile

from tfloop.config import Config
from tfloop.errors import UserError


def start(config: Config) -> str:
    """Import TensorFlow, set it up as `config` says, before anything runs on it; the name of the device.

    Raises:
      UserError: a device that TensorFlow does not see, or settings it does not take.
    """
    if config.tensorflow_log:
        return _start(config)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _silent_stderr():  # messages from before TensorFlow's own log level is read
        return _start(config)


def _start(config: Config) -> str:
    import tensorflow as tf

    threads = tf.config.threading
    for name, found, set_to in (
            ("intra_op_threads", threads.get_intra_op_parallelism_threads(), threads.set_intra_op_parallelism_threads),
            ("inter_op_threads", threads.get_inter_op_parallelism_threads(), threads.set_inter_op_parallelism_threads)):
        wanted = getattr(config, name)
        if wanted != found:
            try:
                set_to(wanted)
            except RuntimeError:
                raise UserError(f"--{name}={wanted}: TensorFlow already runs with {found}; set it first") from None
    tf.debugging.set_log_device_placement(config.log_device_placement)
    gpus = tf.config.list_physical_devices("GPU")
    kind, _, number = config.device.partition(":")
    if kind not in ("auto", "cpu", "gpu") or (number and not (kind == "gpu" and number.isdigit())):
        raise UserError(f"--device={config.device} is unknown; use auto, cpu, gpu or gpu:N")
    if kind == "gpu" and int(number or 0) >= len(gpus):
        seen = ", ".join(device.name.removeprefix("/physical_device:") for device in tf.config.list_physical_devices())
        raise UserError(f"--device={config.device}: TensorFlow {tf.__version__} sees no such GPU, only {seen}; use "
                        f"--device=cpu, or install its GPU build with: pip install 'tfloop[gpu]'")
    chosen = [] if kind == "cpu" else gpus[int(number or 0):][:1]
    tf.config.set_visible_devices(chosen, "GPU")
    for gpu in chosen:
        if config.memory_limit:
            limit = tf.config.LogicalDeviceConfiguration(memory_limit=config.memory_limit)
            tf.config.set_logical_device_configuration(gpu, [limit])
        else:
            tf.config.experimental.set_memory_growth(gpu, config.memory_growth)
    tf.config.list_logical_devices()  # settles the choice
    return tf.config.experimental.get_device_details(chosen[0]).get("device_name", "GPU") if chosen else "CPU"


@contextlib.contextmanager
def _silent_stderr():
    """What C++ writes to stderr is dropped; it is shown after all where the block fails unexpectedly."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        except UserError:
            raise
        except BaseException:
            sink.seek(0)
            os.write(kept, sink.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
