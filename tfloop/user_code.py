"""Functions of the user's own: what they raise is told in one line, as a mistake in the input."""

import contextlib
from collections.abc import Iterator

from tfloop.errors import UserError
from tfloop.wording import first_sentence


@contextlib.contextmanager
def told_in_one_line(what: str, cure: str = "") -> Iterator[None]:
    """Whatever is raised in this block becomes a UserError: "WHAT: KIND: first sentence; CURE"."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a function of one's own may raise
        ending = f"; {cure}" if cure else ""
        raise UserError(f"{what}: {first_sentence(error)}{ending}") from None
