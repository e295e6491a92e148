"""Devices, threads and memory through tf.config, and a quiet start of TensorFlow."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tfloop import parallelism, streams
from tfloop.config import Config
from tfloop.errors import UserError
from tfloop.machine import cluster, guardian, places
from tfloop.settings import whole
from tfloop.stopping import StopAsked, surfacing


def choose(config: Config, cores: int, replicas: int = 1, workers: int = 1) -> Config:
    """`config` with what it leaves open about oneDNN, shards and threads decided.

    oneDNN is on: the step takes 6.1 ms with it and 9.7 ms without (AMD EPYC with AVX-512, 2 cores;
    without AVX-512 12.4 and 15.5 ms). With a shard for every core, operations need no threads of
    their own: 3.3 ms. So it is with the models of an ensemble, which share the cores. With more
    than 64 images to a shard, every core takes several: 51 ms in place of 61 at batch 1024. For
    other models see `benchmarks/models.py`.

    Args:
      config: the settings.
      cores: for each of the replicas that share this process; 0 where a GPU computes, whose one
        shard is the batch and whose threads are left to TensorFlow.
      replicas: in this process.
      workers: processes.
    """
    chosen: dict[str, Any] = {"onednn": "on" if config.onednn == "auto" else config.onednn}
    if not cores:
        return config.replace(**chosen, shards=1)
    if not config.shards:
        chosen["shards"] = _shards(config, cores, replicas, workers)
    side_by_side = chosen.get("shards", config.shards) * config.ensemble
    if side_by_side * replicas > 1:
        intra, inter = max(1, cores // side_by_side), min(side_by_side, cores) * replicas
        chosen["intra_op_threads"] = config.intra_op_threads or intra
        chosen["inter_op_threads"] = config.inter_op_threads or inter
    return config.replace(**chosen)


def _shards(config: Config, cores: int, replicas: int, workers: int) -> int:
    """Parts of a batch to compute side by side, and one after the other, on N cores."""
    on_cpu = config.device in ("auto", "cpu")
    if not config.fast or not on_cpu or config.eager or config.jit_compile:
        return 1
    images = config.batch_size // (config.accumulate * replicas * workers)
    return parallelism.shards(images, cores // config.ensemble)


class Machine(NamedTuple):
    """What TensorFlow runs on."""

    config: Config  # with what was left open about the machine decided
    device: str  # its name
    replicas: Any  # replicas.Replicas; None without --strategy


def start(
    config: Config, asked: Config | None = None, guard: guardian.Guard | None = None
) -> Machine:
    """Import TensorFlow and set it up as `config` says, before anything runs on it.

    With workers, meet them first.

    Args:
      config: the settings to train with.
      asked: those that were asked for, where they differ because a run is resumed.
      guard: the line to the guardian of this worker of a cluster, where there is one.

    Raises:
      UserError: a device that TensorFlow does not see, settings it does not take, or a cluster that
        does not come together.
    """
    # Both are read when TensorFlow is imported. The second keeps oneDNN's backward primitives,
    # which take 5 % of a step to remake.
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0" if config.onednn == "off" else "1"
    os.environ.setdefault("TF_MKL_OPTIMIZE_PRIMITIVE_MEMUSE", "0")
    if config.tensorflow_log:
        return _start(config, asked or config, guard)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _silent_stderr():  # messages from before TensorFlow's own log level is read
        machine = _start(config, asked or config, guard)
    if machine.replicas and machine.replicas.workers > 1:
        _silence_cpp()
    return machine


def _start(config: Config, asked: Config, guard: guardian.Guard | None) -> Machine:
    with _hidden("sklearn", "matplotlib"):
        import tensorflow as tf
    place = None
    if config.strategy == "multi_worker":
        place = places.find()
        has_gpu = config.device != "cpu" and tf.config.list_physical_devices("GPU")
        config, links = cluster.meet(place, asked, config, "GPU" if has_gpu else "CPU")
        if guard:
            guard.watch(links)
        for link in links.values():
            link.close()
    _set_up(config)
    gpus = _chosen_gpus(config)
    tf.config.set_visible_devices(gpus, "GPU")
    for gpu in gpus:
        if config.memory_limit:
            limit = tf.config.LogicalDeviceConfiguration(memory_limit=config.memory_limit)
            tf.config.set_logical_device_configuration(gpu, [limit])
        else:
            tf.config.experimental.set_memory_growth(gpu, config.memory_growth)
    from tfloop.machine.replicas import local_replicas, make_replicas

    local = local_replicas(config, len(gpus))
    workers = len(place.addresses) if place else 1
    cores_each = 0 if gpus else max(1, cores() // local)
    config = _set_threads(config, choose(config, cores_each, local, workers))
    replicas = make_replicas(config, place, len(gpus), guard)
    tf.config.list_logical_devices()  # settles the choice
    name = "CPU"
    if gpus:
        name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
    if replicas:
        name = f"{name} × {replicas.total} ({config.strategy})"
    return Machine(config, name, replicas)


def _set_up(config: Config) -> None:
    """TensorFlow's global switches."""
    import tensorflow as tf

    tf.debugging.set_log_device_placement(config.log_device_placement)
    tf.config.experimental.enable_tensor_float_32_execution(config.precision == "tf32")
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    if config.check_numerics:
        tf.debugging.enable_check_numerics()
    if config.debugger_dump:
        _check_empty(config.debugger_dump)
        tf.debugging.experimental.enable_dump_debug_info(
            config.debugger_dump, "FULL_HEALTH", circular_buffer_size=-1
        )


def _chosen_gpus(config: Config) -> list:
    """The GPUs that this process uses, as `--device` says.

    Raises:
      UserError: an unknown device, or a GPU that TensorFlow does not see.
    """
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    kind, _, number = config.device.partition(":")
    is_number = kind == "gpu" and whole(number) is not None
    if kind not in ("auto", "cpu", "gpu") or (number and not is_number):
        raise UserError(f"--device={config.device} is unknown; use auto, cpu, gpu or gpu:N")
    first = int(number or 0)
    if kind == "gpu" and first >= len(gpus):
        devices = tf.config.list_physical_devices()
        seen = ", ".join(device.name.removeprefix("/physical_device:") for device in devices)
        raise UserError(
            f"--device={config.device}: TensorFlow {tf.__version__} sees no such GPU, only {seen}; "
            "use --device=cpu, or install its GPU build with: pip install 'tensorflow[and-cuda]'"
        )
    if kind == "cpu":
        return []
    if config.strategy != "none" and not number:
        return gpus[: config.replicas or None]
    return gpus[first:][:1]


def _check_empty(folder: str) -> None:
    """Two dumps in one folder make both unreadable."""
    try:
        os.makedirs(folder, exist_ok=True)
        is_empty = not os.listdir(folder)
    except OSError as error:
        raise UserError(f"--debugger_dump={folder}: cannot be made: {error.strerror}") from None
    if not is_empty:
        raise UserError(f"--debugger_dump={folder}: is not empty; name a new folder")


def _set_threads(asked: Config, chosen: Config) -> Config:
    """`chosen`, with TensorFlow's threads set to it.

    Where TensorFlow runs already, only what was asked for matters.
    """
    import tensorflow as tf

    for name in ("intra_op_threads", "inter_op_threads"):
        kind = f"{name.removesuffix('_threads')}_parallelism_threads"
        present = getattr(tf.config.threading, f"get_{kind}")()
        wanted = getattr(chosen, name)
        try:
            if wanted != present:
                getattr(tf.config.threading, f"set_{kind}")(wanted)
        except RuntimeError:
            if getattr(asked, name):
                raise UserError(
                    f"--{name}={wanted}: TensorFlow already runs with {present}; set it first"
                ) from None
            chosen = chosen.replace(**{name: present})
    return chosen


def state_folder() -> Path:
    """Where tfloop notes what it found out on this machine; no folder where there is no home."""
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    except RuntimeError:  # a user of whom the system knows nothing, as in a container
        state = os.devnull
    return Path(state) / "tfloop"


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _silence_cpp() -> None:
    """From now on stderr is Python's alone.

    Where a worker is lost, TensorFlow's C++ says so in many lines.
    """
    sys.stderr.flush()
    streams.move_stderr(os.fdopen(os.dup(2), "w", buffering=1, errors="replace"))
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)


@contextlib.contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """In this block these packages are as if they were not installed.

    Keras imports them where they are, for wrappers and galleries that no command uses: 1.4 of the
    4.6 s that TensorFlow's import takes. Who needs them imports them after it.
    """
    hidden = [package for package in packages if package not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None hides it
    try:
        yield
    finally:
        for package in hidden:
            del sys.modules[package]


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """What C++ writes to stderr is dropped, or shown after all where the block fails."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            with surfacing():
                yield
        except (UserError, KeyboardInterrupt, StopAsked, cluster.NothingToDo):
            raise
        except BaseException:
            sink.seek(0)
            os.write(kept, sink.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
