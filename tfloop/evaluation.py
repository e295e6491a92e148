"""What a classifier gets wrong, and whether it knows: by class, by confidence, picture by picture."""

from typing import NamedTuple

import numpy as np


class ByClass(NamedTuple):
    """Shares for each class, [classes]: of its predictions that are right; of its images that are found; images."""

    precision: np.ndarray
    recall: np.ndarray
    images: np.ndarray


def by_class(labels: np.ndarray, probabilities: np.ndarray) -> ByClass:
    """Precision and recall, scikit-learn's; 0 where there is nothing to divide by."""
    from sklearn.metrics import precision_recall_fscore_support

    classes = range(probabilities.shape[1])
    precision, recall, _, images = precision_recall_fscore_support(labels, probabilities.argmax(axis=1), labels=classes, zero_division=0)
    return ByClass(precision, recall, images)


class Calibration(NamedTuple):
    """Of each bin of confidence, the largest probability, [bins]: the mean confidence, the accuracy, the images."""

    confidence: np.ndarray
    accuracy: np.ndarray
    images: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: Σ images · |accuracy - confidence| / Σ images (Guo et al., arXiv:1706.04599)."""
        return float((self.images * np.abs(self.accuracy - self.confidence)).sum() / self.images.sum())


def calibration(labels: np.ndarray, probabilities: np.ndarray, bins: int = 15) -> Calibration:
    """Over bins of equal width in (0, 1]; one without images has confidence and accuracy 0."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    images, sums, hits = (np.bincount(place, weights, minlength=bins) for weights in (None, confidence, right))
    divisor = np.maximum(images, 1)
    return Calibration(sums / divisor, hits / divisor, images)


def confident_mistakes(labels: np.ndarray, probabilities: np.ndarray, count: int = 10) -> np.ndarray:
    """Rows of the examples that are wrong with the highest probability, the worst first; at most `count`."""
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(axis=1), kind="stable")][:count]
