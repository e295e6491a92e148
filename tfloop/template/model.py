"""Your model. It trains at once as it is; put your own in its place."""

import keras
from keras import layers


def model(input_shape: tuple, classes: int, width: int = 32) -> keras.Model:
    """A keras.Model, or a tf.Module that can be called.

    Of these arguments take what you need, by name:
      input_shape: of one example, without the batch.
      classes: how many there are.
      inputs: shape and dtype of each input, where there are several.
      targets: what the targets are, by name of the output.
      config: all settings.
    Any other is your own. It needs a default, and may be set: --model_options=width=64.

    The model gives logits: a last softmax may be there or not. For targets that are floats it gives
    the values, for several outputs a dict by their names.
    """
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Dense(width, "relu"),
            layers.Dense(width, "relu"),
            layers.Dense(classes),
        ]
    )
