"""Digits by a functional ResNet, from the command line alone.

    ./run.sh train --model=tfloop/examples/resnet.py:model --dataset=digits --optimizer=adam \
        --schedule=one_cycle --learning_rate=0.01 --epochs=10 --batch_size=32 --name=resnet

    ./run.sh sweep --model=tfloop/examples/resnet.py:model --dataset=digits --optimizer=adam \
        --epochs=3 --batch_size=32 --grid="learning_rate=0.003,0.01 model.width=8,16"

Residual blocks with batch normalisation (He, Zhang, Ren and Sun, arXiv:1512.03385), the second with
half the size and twice the width.
"""

import keras
from keras import layers


def model(input_shape: tuple, classes: int, width: int = 16) -> keras.Model:
    inputs = keras.Input(input_shape)
    x = layers.Conv2D(width, 3, padding="same", use_bias=False)(inputs)
    x = block(x, width, stride=1)
    x = block(x, 2 * width, stride=2)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def block(x: keras.KerasTensor, width: int, stride: int) -> keras.KerasTensor:
    """x + two convolutions of it; where the shape changes, x goes through one of size 1."""
    shortcut = x
    x = layers.ReLU()(layers.BatchNormalization()(x))
    if stride > 1 or shortcut.shape[-1] != width:
        shortcut = layers.Conv2D(width, 1, stride, use_bias=False)(x)
    x = layers.Conv2D(width, 3, stride, padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
    return layers.Add()([x, shortcut])
