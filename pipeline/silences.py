"""What libraries say at every start that nobody can act on: each message by its logger and some of its words.

Whatever is not named here reaches the terminal as a warning under the library's name.
"""

from __future__ import annotations

import logging

# Where torchao is installed, transformers imports it to load any model.
SILENCED: tuple[tuple[str, str], ...] = (
    # Its kernels that were built for another machine; it has others.
    ("torchao", "Failed to load "),
    # Its Triton kernels are for GPUs; torch.compile says itself where it misses Triton.
    ("torchao.kernel.intmm", "Warning: Detected no triton"),
    # A function that torch deprecates, called by torchao.
    ("torch.utils._pytree", "register_constant() on Enum subclasses is deprecated"),
)


class _Without(logging.Filter):
    """Lets everything pass but messages with these words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to say it."""
        return self.words not in record.getMessage()


def silence() -> None:
    """From now on these messages are dropped in this process."""
    for name, words in SILENCED:
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Without) and each.words == words for each in logger.filters):
            logger.addFilter(_Without(words))
