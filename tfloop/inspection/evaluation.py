"""What a classifier gets wrong, and whether it knows: by class, by confidence, by picture."""

from typing import NamedTuple

import numpy as np


class ByClass(NamedTuple):
    """Shares for each class, [classes]."""

    precision: np.ndarray  # of its predictions, how many are right
    recall: np.ndarray  # of its images, how many are found
    images: np.ndarray  # how many there are


def by_class(labels: np.ndarray, probabilities: np.ndarray) -> ByClass:
    """Precision and recall, scikit-learn's; 0 where there is nothing to divide by."""
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, _, images = precision_recall_fscore_support(
        labels,
        probabilities.argmax(axis=1),
        labels=range(probabilities.shape[1]),
        zero_division=0,
    )
    return ByClass(precision, recall, images)


class Calibration(NamedTuple):
    """Of each bin of confidence, the largest probability, [bins]."""

    confidence: np.ndarray  # its mean
    accuracy: np.ndarray
    images: np.ndarray  # how many there are

    @property
    def error(self) -> float:
        """The expected calibration error: Σ images · |accuracy - confidence| / Σ images.

        (Guo et al., arXiv:1706.04599.)
        """
        gap = np.abs(self.accuracy - self.confidence)
        return float((self.images * gap).sum() / self.images.sum())


def calibration(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> Calibration:
    """Over bins of equal width in (0, 1]; one without images has confidence and accuracy 0."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    images = np.bincount(place, minlength=bins)
    divisor = np.maximum(images, 1)
    return Calibration(
        np.bincount(place, confidence, minlength=bins) / divisor,
        np.bincount(place, correct, minlength=bins) / divisor,
        images,
    )


def confident_mistakes(
    labels: np.ndarray, probabilities: np.ndarray, count: int = 10
) -> np.ndarray:
    """Rows of at most `count` examples that are wrong with the highest probability, worst first."""
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")][:count]
