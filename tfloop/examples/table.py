"""A table classified: is a breast tumour malignant or benign, from 30 measurements?

    ./run.sh train --model=tfloop/examples/table.py:model --dataset=tfloop/examples/table.py:data \
        --metrics=roc_auc_score,f1_score --optimizer=adamw --epochs=20 --batch_size=32 --name=table

The data are those that scikit-learn ships: 569 patients (Wolberg, Street, Mangasarian, 1995). A
fifth of them are kept for the test. The columns are standardised, and the class names travel along.
"""

import keras
from sklearn.datasets import load_breast_cancer


def data() -> dict:
    return {"x_train": load_breast_cancer(), "test_size": 114}


def model(input_shape: tuple, classes: int, width: int = 32) -> keras.Model:
    """`width` may be set: --model_options=width=64; a sweep calls it model.width."""
    return keras.Sequential(
        [
            keras.Input(input_shape),
            keras.layers.Dense(width, "relu"),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(width, "relu"),
            keras.layers.Dense(classes),
        ]
    )
