"""Models of the kinds that people train, from Keras's layers alone; `models.py` measures them.

Each function makes one, which ends in logits of ten classes.
"""

import keras
from keras import layers


def cnn() -> keras.Model:
    """The article's network: 28×28×1, 83,000 weights."""
    return keras.Sequential([keras.Input((28, 28, 1)), *_cnn_layers()])


def cnn_functional() -> keras.Model:
    """The same layers, called one after the other."""
    inputs = x = keras.Input((28, 28, 1))
    for layer in _cnn_layers():
        x = layer(x)
    return keras.Model(inputs, x)


def cnn_nested() -> keras.Model:
    """The same layers in two models of their own inside a third."""
    first, last = _cnn_layers()[:6], _cnn_layers()[6:]
    inputs = keras.Input((28, 28, 1))
    body, head = keras.Sequential(first), keras.Sequential(last)
    return keras.Model(inputs, head(body(inputs)))


def _cnn_layers() -> list:
    return [
        layers.Conv2D(32, 3, activation="relu"),
        layers.MaxPooling2D(2),
        layers.Conv2D(64, 3, activation="relu"),
        layers.MaxPooling2D(2),
        layers.Conv2D(64, 3, activation="relu"),
        layers.Flatten(),
        layers.Dense(70, activation="relu"),
        layers.Dense(10),
    ]


def resnet() -> keras.Model:
    """A residual network with batch normalisation: 32×32×3, 7 convolutions, 76,000 weights."""
    inputs = keras.Input((32, 32, 3))
    x = _normed(layers.Conv2D(16, 3, padding="same", use_bias=False)(inputs))
    for width, stride in ((16, 1), (32, 2), (64, 2)):
        shortcut = x
        if stride > 1:
            convolution = layers.Conv2D(width, 1, stride, use_bias=False)
            shortcut = layers.BatchNormalization()(convolution(x))
        y = _normed(layers.Conv2D(width, 3, stride, padding="same", use_bias=False)(x))
        y = layers.Conv2D(width, 3, padding="same", use_bias=False)(y)
        y = layers.BatchNormalization()(y)
        x = layers.ReLU()(layers.Add()([y, shortcut]))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def vgg() -> keras.Model:
    """A stack of convolutions with batch normalisation: 32×32×3, 6 of them, 350,000 weights."""
    model = keras.Sequential([keras.Input((32, 32, 3))])
    for width in (32, 64, 128):
        for _ in range(2):
            model.add(layers.Conv2D(width, 3, padding="same", use_bias=False))
            model.add(layers.BatchNormalization())
            model.add(layers.Activation("relu"))
        model.add(layers.MaxPooling2D(2))
    model.add(layers.Flatten())
    model.add(layers.Dense(32, activation="relu"))
    model.add(layers.Dense(10))
    return model


def mobilenet() -> keras.Model:
    """Depthwise and pointwise convolutions with batch normalisation and ReLU6: 32×32×3."""
    inputs = keras.Input((32, 32, 3))
    x = _normed6(layers.Conv2D(32, 3, padding="same", use_bias=False)(inputs))
    for width, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1)):
        x = _normed6(layers.DepthwiseConv2D(3, stride, padding="same", use_bias=False)(x))
        x = _normed6(layers.Conv2D(width, 1, use_bias=False)(x))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def separable() -> keras.Model:
    """Separable convolutions in two branches that are concatenated: 32×32×3."""
    inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(32, 3, padding="same", activation="relu")(inputs)
    for width in (32, 64):
        narrow = layers.Conv2D(width, 1, activation="relu")(x)
        wide = layers.SeparableConv2D(width, 3, padding="same", activation="relu")(x)
        x = layers.MaxPooling2D(2)(layers.Concatenate()([narrow, wide]))
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def mlp() -> keras.Model:
    """784-512-512-10: 670,000 weights."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Flatten(),
            layers.Dense(512, activation="relu"),
            layers.Dense(512, activation="relu"),
            layers.Dense(10),
        ]
    )


def _normed(x: keras.KerasTensor) -> keras.KerasTensor:
    return layers.ReLU()(layers.BatchNormalization()(x))


def _normed6(x: keras.KerasTensor) -> keras.KerasTensor:
    return layers.ReLU(6.0)(layers.BatchNormalization()(x))


MODELS = {
    "cnn": cnn,
    "cnn, functional": cnn_functional,
    "cnn, nested": cnn_nested,
    "resnet": resnet,
    "vgg": vgg,
    "mobilenet": mobilenet,
    "separable": separable,
    "mlp": mlp,
}
