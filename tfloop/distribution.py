"""The one step on several devices and machines, through tf.distribute.

A batch is cut into a part for each replica. Each goes through the model and back, every replica with its own copy of
the weights; the gradients, weighed by their examples, are added up, and the update is made from the sum. Only the model
is copied. With several workers each holds a whole state, and all make the same update from the same sum.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from tfloop import cluster
from tfloop.config import Config
from tfloop.errors import UserError, WorkerLost
from tfloop.pipelines import Batch
from tfloop.state import TrainState
from tfloop.step import Pass, weighed, whole

LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.InternalError, tf.errors.CancelledError, tf.errors.UnknownError,
        tf.errors.DeadlineExceededError, tf.errors.FailedPreconditionError)  # what TensorFlow raises, if it is one of the others
GRACE = 5.0  # seconds that a worker stays reachable after it lost another, for the others not to take it for the lost one


class Replicas:
    """The replicas of a tf.distribute strategy.

    Attributes:
      strategy: in whose scope the model is made.
      total: replicas in all; local: those of this process.
      worker, workers: the index of this process, and how many there are.
    """

    def __init__(self, strategy: tf.distribute.Strategy, place: cluster.Place = cluster.Place(0, ("",))):
        self.strategy, self._place = strategy, place
        self.worker, self.workers = place.index, len(place.addresses)
        self.total = strategy.num_replicas_in_sync
        self.local = self.total // self.workers
        self._watch = None

    @property
    def is_chief(self) -> bool:
        return self._place.is_chief

    def differentiate(self, differentiate: Callable) -> Callable:
        """`differentiate`, on a part of the batch in each replica; the result is that of the whole batch.

        It takes this worker's part of the batch, which is the whole one where there is one worker.
        """
        def in_replicas(state: TrainState, batch: Batch) -> Pass:
            rows = batch.labels.shape[0] // self.local

            def one() -> tf.Tensor:
                here = self._index_here()
                part = Batch(*(tf.slice(tensor, [here * rows] + [0] * (len(tensor.shape) - 1), [rows, *tensor.shape[1:]])
                               for tensor in batch)) if self.local > 1 else batch
                return weighed(differentiate(state, part, part=self.worker * self.local + here, parts=self.total))

            return whole(self._sum(one), state)

        return in_replicas

    def _index_here(self) -> tf.Tensor | int:
        """Which of this process's replicas is running."""
        if self.local == 1:
            return 0
        return tf.distribute.get_replica_context().replica_id_in_sync_group - self.worker * self.local

    def _sum(self, function: Callable) -> tf.Tensor:
        return self.strategy.reduce(tf.distribute.ReduceOp.SUM, self.strategy.run(function), axis=None)

    def _tell(self, values: np.ndarray) -> np.ndarray:
        """The sum over all workers of an int32 vector."""
        return self._total(tf.constant(values)).numpy()

    def agree(self, flag: bool) -> bool:
        """Is the flag true on any worker? All must ask, at the same place in the run."""
        return flag if self.workers == 1 else bool(self._tell(np.int32([flag]))[0])

    def check_same(self, value: int, what: str) -> None:
        """Raises UserError, on every worker, where they have different values."""
        if self.workers > 1:
            self._watch = self._watch or cluster.Watch(self._place)
            found = self._tell(np.eye(self.workers, dtype=np.int32)[self.worker] * np.int32(value))
            if different := [index for index, other in enumerate(found) if other != found[0]]:
                raise UserError(f"{self._place.name(different[0])} has other {what} than {self._place.name(0)}")

    def share(self, state: TrainState) -> None:
        """The chief's state becomes that of all workers, bit for bit."""
        if self.workers == 1:
            return
        variables = [variable for _, variable in sorted(state.named().items())]
        values = [np.asarray(variable) for variable in variables]
        bits = np.frombuffer(b"".join(value.tobytes() + bytes(-value.nbytes % 4) for value in values), np.int32)
        shared = self._tell(bits if self.is_chief else np.zeros_like(bits)).tobytes()
        for variable, value in zip(variables, values):
            variable.assign(np.frombuffer(shared[:value.nbytes], value.dtype).reshape(value.shape))
            shared = shared[value.nbytes + -value.nbytes % 4:]

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """In this block TensorFlow's error where another worker is gone becomes a WorkerLost that names it."""
        if self.workers == 1:
            yield
            return
        try:
            yield
        except LOST as error:
            lost = self._watch and self._watch.gone or cluster.unreachable(self._place)
            if not lost and (named := re.findall(r"/task:(\d+)", error.message)):
                lost = sorted({int(index) for index in named} - {self.worker})[:1]
            if not lost:
                raise
            time.sleep(GRACE)
            who = " and ".join(map(self._place.name, lost))
            raise WorkerLost(f"{who} {'are' if len(lost) > 1 else 'is'} gone; start the cluster again with --resume=auto to go on from the last checkpoint") from None

    @tf.function(autograph=False)
    def _total(self, values: tf.Tensor) -> tf.Tensor:
        return self._sum(lambda: tf.where(tf.equal(self._index_here(), 0), values, 0))


def local(config: Config, gpus: int) -> int:
    """Replicas in this process, from the settings and the number of GPUs that it uses.

    Raises:
      UserError: more replicas than GPUs.
    """
    if config.strategy == "none":
        return 1
    if gpus and config.replicas > gpus:
        raise UserError(f"--replicas={config.replicas}: there are {gpus} GPUs")
    return config.replicas or gpus or 1


def make(config: Config, place: cluster.Place | None, gpus: int) -> Replicas | None:
    """The replicas that the settings ask for, before TensorFlow has made its devices; None for one that needs no strategy.

    Raises:
      UserError: a batch that cannot be cut into as many parts.
    """
    if config.strategy == "none":
        return None
    replicas, kind = local(config, gpus), "GPU" if gpus else "CPU"
    if place and not gpus and replicas > 1:
        raise UserError(f"--replicas={replicas}: with --strategy=multi_worker on CPUs each process has one; start more processes")
    parts = replicas * (len(place.addresses) if place else 1) * config.accumulate
    if config.batch_size % parts:
        raise UserError(f"--batch_size={config.batch_size} cannot be cut into {parts} equal parts, one for each replica"
                        f"{' and accumulation' * (config.accumulate > 1)}")
    if not gpus and replicas > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    if config.strategy == "mirrored":
        return Replicas(tf.distribute.MirroredStrategy([f"{kind}:{i}" for i in range(replicas)]))
    how = tf.distribute.experimental.CommunicationImplementation.NCCL if gpus else tf.distribute.experimental.CommunicationImplementation.RING
    options = tf.distribute.experimental.CommunicationOptions(implementation=how)
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(place.addresses)}), task_type="worker", task_id=place.index,
        num_accelerators={"GPU": gpus} if gpus else {"CPU": replicas}, rpc_layer="grpc")
    return Replicas(tf.distribute.MultiWorkerMirroredStrategy(resolver, options), place)
