"""What every test starts with."""

import logging

import pytest


@pytest.fixture(autouse=True)
def the_log_is_put_back():
    """The program sets up the log of `quire` for its process; the tests share one."""
    logger = logging.getLogger("quire")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before
