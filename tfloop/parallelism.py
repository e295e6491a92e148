"""In how many parts a batch is computed on the cores of a CPU."""

import math

FEWEST, MOST = 16, 64  # rows in a shard: fewer do not repay its operations, more leave the cache
MOST_SHARDS = 32  # as a rule; each is a copy of the model in the graph


def shards(rows: int, cores: int) -> int:
    """Parts of a batch of so many rows, to compute side by side and one after the other.

    There is nothing to part where a shard would have fewer than 16 rows. Where it would have more
    than 64, every core takes several.
    """
    at_once = max(1, min(cores, rows // FEWEST))
    in_turn = min(math.ceil(rows / (at_once * MOST)), max(1, MOST_SHARDS // at_once))
    return at_once * in_turn
