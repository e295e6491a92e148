"""Where a process stands in its cluster, from TF_CONFIG or from Slurm's variables."""

import json
import os
import socket
import subprocess
import sys
from typing import Any, NamedTuple

from tfloop.errors import UserError
from tfloop.settings import whole


class Place(NamedTuple):
    """Where a process stands in its cluster."""

    index: int  # type: ignore[assignment]  # it hides tuple.index
    addresses: tuple[str, ...]  # of all workers: "host:port"

    @property
    def is_chief(self) -> bool:
        return self.index == 0

    def name(self, index: int) -> str:
        """worker 1 (host:port)"""
        return f"worker {index} ({self.addresses[index]})"


def find() -> Place:
    """The place of this process, from TF_CONFIG, or from the variables that Slurm sets.

    Raises:
      UserError: neither is there, or TF_CONFIG is not what TensorFlow documents.
    """
    if "TF_CONFIG" in os.environ:
        return _from_tf_config(os.environ["TF_CONFIG"])
    if "SLURM_PROCID" in os.environ:
        return _from_slurm()
    raise UserError(
        f"--strategy=multi_worker: set TF_CONFIG={_EXAMPLE} for each process, start them with "
        "Slurm, or try it out with `tfloop launch --workers=2`"
    )


_EXAMPLE = '{"cluster": {"worker": ["host:port", …]}, "task": {"type": "worker", "index": 0}}'


def _wrong_tf_config(what: str) -> UserError:
    return UserError(
        f"TF_CONFIG: {what}; expected a cluster of workers and a task, as in {_EXAMPLE}"
    )


def _from_tf_config(text: str) -> Place:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong_tf_config(f"not JSON: {error}") from None
    content = content if isinstance(content, dict) else {}
    cluster, task = content.get("cluster"), content.get("task")
    if not isinstance(cluster, dict) or not isinstance(task, dict):
        raise _wrong_tf_config("has no cluster or no task")
    jobs = [cluster.get(job, []) for job in ("chief", "worker")]
    if set(cluster) - {"chief", "worker"} or not all(isinstance(job, list) for job in jobs):
        raise _wrong_tf_config(f"has jobs {', '.join(map(str, cluster))}")
    addresses = [address for job in jobs for address in job]
    for address in addresses:
        host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
        if not _is_host(host) or not whole(port, most=65535):
            raise _wrong_tf_config(f"{address!r} is no host:port")
    if len(set(addresses)) < len(addresses):
        raise _wrong_tf_config("two workers have one address")
    job: Any = task.get("type")
    index: Any = task.get("index")
    is_index = isinstance(index, int) and not isinstance(index, bool)
    places = range(len(cluster.get(job, []))) if job in ("chief", "worker") else range(0)
    if not is_index or index not in places:
        raise _wrong_tf_config(f"task {job!r} {index!r} is not in the cluster")
    first = len(jobs[0]) if job == "worker" else 0
    return Place(first + int(index), tuple(addresses))


def _is_host(name: str) -> bool:
    """May it be a host's name or address? Each part of a name has 1 to 63 characters."""
    try:
        return bool(name.encode("idna")) and name.isprintable() and " " not in name
    except UnicodeError:
        return False


def _from_slurm() -> Place:
    # TensorFlow knows best how to read Slurm's variables. It is asked in another process: this one
    # becomes a guardian, and has not yet chosen what TensorFlow reads when it is imported.
    done = subprocess.run([sys.executable, "-c", _ASK_SLURM], capture_output=True, text=True)
    try:
        if done.returncode:
            raise ValueError(done.stderr.strip().splitlines()[-1])
        workers = json.loads(done.stdout.splitlines()[-1])
        if odd := [each for each in workers if not _is_host(each.rpartition(":")[0])]:
            raise ValueError(f"{odd[0]!r} is no host:port")
        index = whole(os.environ["SLURM_PROCID"], most=len(workers) - 1)
        if index is None:
            raise ValueError(
                f"SLURM_PROCID={os.environ['SLURM_PROCID']} is none of {len(workers)} tasks"
            )
        return Place(index, tuple(workers))
    except (ValueError, IndexError) as error:
        raise UserError(
            f"--strategy=multi_worker: Slurm's variables do not describe a job step: {error}"
        ) from None


_ASK_SLURM = """
import json
import tensorflow as tf
resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
    gpus_per_node=4096, gpus_per_task=1, auto_set_gpu=False
)
print(json.dumps(resolver.cluster_spec().as_dict()["worker"]))
"""


def unreachable(place: Place) -> list[int]:
    """The other workers at whose address nobody listens."""
    gone = []
    for index, address in enumerate(place.addresses):
        host, _, port = address.rpartition(":")
        if index != place.index:
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
            except (OSError, UnicodeError):
                gone.append(index)
    return gone
