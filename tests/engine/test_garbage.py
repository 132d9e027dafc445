"""What is loaded once is not searched for garbage; what serving leaves behind still is."""

import gc
import weakref

import pytest
from quire.garbage import spare_what_stays


class Node:
    pass


def cycle():
    node = Node()
    node.itself = node
    return weakref.ref(node)


@pytest.fixture
def collector():
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("collector")
def test_what_stays_is_spared_and_garbage_is_not():
    lost, stays = cycle(), Node()
    spare_what_stays()
    assert lost() is None  # garbage of the start does not stay for good
    assert gc.get_freeze_count() > 0
    assert not any(found is stays for found in gc.get_objects())
    later = cycle()
    gc.collect()
    assert later() is None
