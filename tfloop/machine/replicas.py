"""The one step on several devices and machines, through tf.distribute.

A batch is cut into a part for each replica. Each goes through the model and back, every replica
with its own copy of the weights; the gradients, weighed by their examples, are added up, and the
update is made from the sum. Only the model is copied. With several workers each holds a whole
state, and all make the same update from the same sum.
"""

import contextlib
import re
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from tfloop.config import Config
from tfloop.data.pipelines import Batch
from tfloop.errors import UserError, WorkerLost
from tfloop.machine import guardian, places
from tfloop.models import normalization
from tfloop.randomness import Part, part_of
from tfloop.state import TrainState
from tfloop.step import Pass, from_sums, no_pass, rows_of, to_sums

# What TensorFlow raises where another worker is gone; other faults raise them too.
LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.InternalError,
    tf.errors.CancelledError,
    tf.errors.UnknownError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
)


class Replicas:
    """The replicas of a tf.distribute strategy.

    Attributes:
      strategy: in whose scope the model is made.
      total: replicas in all.
      local: those of this process.
      worker: the index of this process.
      workers: how many processes there are.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        place: places.Place = places.Place(0, ("",)),  # noqa: B008 (a constant)
        guard: guardian.Guard | None = None,
    ) -> None:
        self.strategy, self._place, self._guard = strategy, place, guard
        self.worker, self.workers = place.index, len(place.addresses)
        self.total = strategy.num_replicas_in_sync
        self.local = self.total // self.workers

    @property
    def is_chief(self) -> bool:
        return self._place.is_chief

    def grad_fn(self, grad_fn: Callable) -> Callable:
        """`grad_fn`, on a part of the batch in each replica; its result is that of the whole batch.

        It takes this worker's part of the batch, which is the whole one where there is one worker.
        Of a batch with fewer rows than there are replicas in all it takes the whole one.
        """

        def in_replicas(state: TrainState, batch: Batch, part: Part | None = None) -> Pass:
            rows = batch.rows
            whole = part or Part(0, rows, rows)

            def in_one() -> tf.Tensor:
                index = self._local_index()
                if whole.total < self.total:
                    # Too few for all: each computes the whole batch, so that the averages of its
                    # copy of the model move, and the first one's result counts.
                    with normalization.alone():
                        result = grad_fn(state, batch, whole)
                    is_first = index == 0 and self.is_chief
                    return to_sums(result if is_first else no_pass(state))
                first, size = part_of(rows, index, self.local)
                own = rows_of(batch, first, size) if self.local > 1 else batch
                return to_sums(grad_fn(state, own, Part(whole.first + first, size, whole.total)))

            return from_sums(self._sum(in_one), state)

        return in_replicas

    def _local_index(self) -> int:
        """Which of this process's replicas is running."""
        if self.local == 1:
            return 0
        context = tf.distribute.get_replica_context()
        index = tf.get_static_value(context.replica_id_in_sync_group)
        return int(index) - self.worker * self.local

    def _sum(self, function: Callable[[], tf.Tensor]) -> tf.Tensor:
        """The sum over all replicas of what the function gives in each."""
        results = self.strategy.run(function)
        return self.strategy.reduce(tf.distribute.ReduceOp.SUM, results, axis=None)

    def _sum_over_workers(self, values: np.ndarray) -> np.ndarray:
        """The sum over all workers of an int32 vector."""
        return self._total(tf.constant(values)).numpy()

    def agree(self, flag: bool) -> bool:
        """Is the flag true on any worker? All must ask, at the same place in the run."""
        if self.workers == 1:
            return flag
        return bool(self._sum_over_workers(np.array([flag], np.int32))[0])

    def check_same(self, value: int, what: str) -> None:
        """Raises UserError, on every worker, where they have different values."""
        if self.workers == 1:
            return
        own = np.eye(self.workers, dtype=np.int32)[self.worker] * np.int32(value)
        values = self._sum_over_workers(own)
        for index, other in enumerate(values):
            if other != values[0]:
                names = self._place.name(index), self._place.name(0)
                raise UserError(f"{names[0]} has other {what} than {names[1]}")

    def share(self, state: TrainState) -> None:
        """The chief's state becomes that of all workers, bit for bit."""
        if self.workers == 1:
            return
        variables = [variable for _, variable in sorted(state.named().items())]
        values = [np.asarray(variable) for variable in variables]
        padded = [value.tobytes() + bytes(-value.nbytes % 4) for value in values]
        bits = np.frombuffer(b"".join(padded), np.int32)
        sent = bits if self.is_chief else np.zeros_like(bits)
        received = self._sum_over_workers(sent).tobytes()
        for variable, value in zip(variables, values, strict=True):
            content = np.frombuffer(received[: value.nbytes], value.dtype)
            variable.assign(content.reshape(value.shape))
            received = received[value.nbytes + -value.nbytes % 4 :]

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """In this block TensorFlow's error where a worker is gone becomes a WorkerLost."""
        if self.workers == 1:
            yield
            return
        try:
            yield
        except LOST as error:
            lost = self._lost(error.message)
            if not lost:
                raise
            raise WorkerLost(guardian.lost_text(self._place, lost)) from None

    def _lost(self, message: str) -> list[int]:
        """The workers that are gone, as far as that can be told."""
        lost = self._guard.gone() if self._guard else []
        if lost := lost or places.unreachable(self._place):
            return lost
        if "CoordinationService" in message and self.worker:  # it runs in the chief's process
            return [0]
        named = {int(index) for index in re.findall(r"/task:(\d+)", message)}
        return sorted(named - {self.worker})[:1]

    @tf.function(autograph=False)
    def _total(self, values: tf.Tensor) -> tf.Tensor:
        return self._sum(lambda: values if self._local_index() == 0 else tf.zeros_like(values))


def local_replicas(config: Config, gpus: int) -> int:
    """Replicas in this process, from the settings and the number of GPUs that it uses.

    Raises:
      UserError: more replicas than GPUs.
    """
    if config.strategy == "none":
        return 1
    if gpus and config.replicas > gpus:
        raise UserError(f"--replicas={config.replicas}: there are {gpus} GPUs")
    return config.replicas or gpus or 1


def make_replicas(
    config: Config, place: places.Place | None, gpus: int, guard: guardian.Guard | None = None
) -> Replicas | None:
    """The replicas that the settings ask for; None for one that needs no strategy.

    It is called before TensorFlow has made its devices.

    Args:
      config: the settings.
      place: of this process in its cluster; None without one.
      gpus: that this process uses.
      guard: knows which of the other workers are gone; None where no guardian stands over it.

    Raises:
      UserError: a batch that cannot be cut into as many parts.
    """
    if config.strategy == "none":
        return None
    replicas, kind = local_replicas(config, gpus), "GPU" if gpus else "CPU"
    if place and not gpus and replicas > 1:
        raise UserError(
            f"--replicas={replicas}: with --strategy=multi_worker on CPUs each process has one; "
            "start more processes"
        )
    parts = replicas * (len(place.addresses) if place else 1) * config.accumulate
    if config.batch_size % parts:
        also = " and accumulation" if config.accumulate > 1 else ""
        raise UserError(
            f"--batch_size={config.batch_size} cannot be cut into {parts} equal parts, one for "
            f"each replica{also}"
        )
    if not gpus and replicas > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        devices = [tf.config.LogicalDeviceConfiguration()] * replicas
        tf.config.set_logical_device_configuration(cpu, devices)
    if not place:
        names = [f"{kind}:{i}" for i in range(replicas)]
        return Replicas(tf.distribute.MirroredStrategy(names))
    implementations = tf.distribute.experimental.CommunicationImplementation
    implementation = implementations.NCCL if gpus else implementations.RING
    options = tf.distribute.experimental.CommunicationOptions(implementation=implementation)
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(place.addresses)}),
        task_type="worker",
        task_id=place.index,
        num_accelerators={kind: gpus or replicas},
        rpc_layer="grpc",
    )
    return Replicas(tf.distribute.MultiWorkerMirroredStrategy(resolver, options), place, guard)
