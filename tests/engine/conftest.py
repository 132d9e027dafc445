"""Checkpoints for the engine's tests, made once per session."""

import pytest
from quire.testing.tiny_models import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """name -> folder of that architecture's random checkpoint."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = make_checkpoint(name, tmp_path_factory.mktemp("engine") / name)
        return str(made[name])

    return get
