"""tf.data without its autotuner."""

import tensorflow as tf

# For every iterator: freeing one waits for its autotuner, which may miss the call and sleep on for
# a minute.
UNTUNED = tf.data.Options()
UNTUNED.autotune.enabled = False
