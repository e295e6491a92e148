"""A regression: how far has diabetes got after a year, from ten measurements?

    ./run.sh train --model=tfloop/examples/regression.py:model \
        --dataset=tfloop/examples/regression.py:data --validation_size=60 --metrics=r2_score \
        --optimizer=adam --learning_rate=0.01 --epochs=60 --batch_size=32 --name=regression

The targets are floats, so the loss is the squared error. `evaluate` prints quantiles of the error,
and draws predicted against true values with --plot. The data are those that scikit-learn ships: 442
patients (Efron, Hastie, Johnstone and Tibshirani, 2004).
"""

import keras
from sklearn.datasets import load_diabetes


def data() -> dict:
    return {"x_train": load_diabetes(), "test_size": 88}


def model(input_shape: tuple, width: int = 16) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input(input_shape),
            keras.layers.Dense(width, "relu"),
            keras.layers.Dense(1, bias_initializer=keras.initializers.Constant(150.0)),
        ]
    )
