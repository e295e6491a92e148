"""Functions of one's own in the place of methods of Keras's layers, for a while, in one thread."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

Answers = dict[tuple[Any, str], Callable]  # what answers for a layer's method

_here = threading.local()  # replicas are traced in threads that take turns
_lock = threading.Lock()
_installed: dict[tuple[Any, str], int] = {}
_before: dict[tuple[Any, str], Callable] = {}  # methods that an object has of its own


@contextlib.contextmanager
def answering(answers: Answers) -> Iterator[None]:
    """In this block, and in this thread, these functions answer for methods of layers.

    Each is given Keras's own method first.
    """
    outer = getattr(_here, "answers", {})
    with _lock:
        for layer, method in answers:
            _installed[layer, method] = _installed.get((layer, method), 0) + 1
            if _installed[layer, method] == 1:
                if method in layer.__dict__:
                    _before[layer, method] = layer.__dict__[method]
                layer.__dict__[method] = _dispatch(layer, method, getattr(layer, method))
    _here.answers = answers
    try:
        yield
    finally:
        _here.answers = outer
        with _lock:
            for layer, method in answers:
                _installed[layer, method] -= 1
                if not _installed[layer, method]:
                    del _installed[layer, method], layer.__dict__[method]
                    if (layer, method) in _before:
                        layer.__dict__[method] = _before.pop((layer, method))


def _dispatch(layer: Any, method: str, own: Callable) -> Callable:
    def dispatched(*arguments: Any, **options: Any) -> Any:
        answer = getattr(_here, "answers", {}).get((layer, method))
        return answer(own, *arguments, **options) if answer else own(*arguments, **options)

    return dispatched
