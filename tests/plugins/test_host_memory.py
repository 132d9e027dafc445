"""Main memory in large pages: zeroed, aligned, apart from each other, and given back."""

import gc
import mmap
import re
import weakref
from pathlib import Path
from threading import Thread

import pytest
import torch
from quire.contract import host_memory
from quire.contract.host_device import AT_ONCE
from quire.contract.host_memory import ALIGNMENT, CHUNK, LARGE_PAGE, PagesAhead, host_zeros, populate
from quire.plugin import DeviceInit, HostArena, HostDevice


@pytest.mark.parametrize("count", [0, 1, 5000, LARGE_PAGE + 1])
def test_zeros_begin_at_a_large_page(count):
    memory = host_zeros(count)
    assert memory.shape == (count,)
    assert memory.dtype is torch.uint8
    assert not memory.any()
    assert count == 0 or memory.data_ptr() % LARGE_PAGE == 0
    memory.fill_(7)


def resident():
    """Bytes of the process that are in memory."""
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("the system does not tell")
    return int(re.search(r"Rss:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) << 10


def test_much_memory_is_not_touched_before_it_is_written():
    before, memory = resident(), host_zeros(1 << 30)
    memory[5] = 1
    assert resident() - before < 1 << 28


def test_pages_come_ahead_and_keep_what_they_hold():
    before, pages = resident(), PagesAhead()
    found = [host_zeros(size) for size in (LARGE_PAGE * 20 + 5, 0, 3, LARGE_PAGE * 10)]
    found[0][:: LARGE_PAGE // 2] = 7
    for memory in found:
        pages.add(memory)
    found[3][1::4097] = 9  # while the thread is at work
    pages.wait()
    if not populate(found[3].data_ptr(), 1):
        pytest.skip("the system gives pages when they are written")
    assert resident() - before > 29 * LARGE_PAGE
    assert found[0].count_nonzero() == (found[0][:: LARGE_PAGE // 2] == 7).sum() == 41
    assert found[3].count_nonzero() == (found[3][1::4097] == 9).sum() > 5000
    pages.add(found[0])  # the thread has ended, another one begins
    pages.wait()


def test_pages_of_memory_that_is_given_back_are_forgotten(monkeypatch):
    asked, pages = [], PagesAhead()
    monkeypatch.setattr(host_memory, "populate", lambda address, size: asked.append(address) or len(asked) < 3)
    kept, gone = host_zeros(10 * LARGE_PAGE), host_zeros(10 * LARGE_PAGE)
    first = gone.data_ptr()
    with pages._lock:  # the thread begins when both are there
        pages._waiting.append((weakref.ref(gone), 0))
        del gone
    pages.add(kept)
    pages.wait()
    assert first not in asked
    # The third answer was that the system does not know how.
    assert asked == [kept.data_ptr() + at * LARGE_PAGE for at in range(3)]


def test_a_device_has_its_pages_ahead():
    device = HostDevice(DeviceInit())
    before, cache = resident(), device.zeros((40, LARGE_PAGE), torch.int8)
    assert resident() - before > AT_ONCE - LARGE_PAGE
    device._pages.wait()
    if not populate(cache.data_ptr(), 1):
        pytest.skip("the system gives pages when they are written")
    assert resident() - before > 39 * LARGE_PAGE
    assert not cache.any()


def test_a_refusal_is_a_memory_error():
    with pytest.raises(MemoryError, match="refuses"):
        host_zeros(1 << 62)


def test_tensors_of_an_arena_are_aligned_and_apart():
    arena = HostArena()
    sizes = [1, 63, 64, 65, 0, CHUNK // 2, CHUNK // 2 + 1, CHUNK + 5, 100]
    found = [arena.empty(size) for size in sizes]
    for value, (size, tensor) in enumerate(zip(sizes, found, strict=True)):
        assert tensor.shape == (size,)
        assert size == 0 or tensor.data_ptr() % ALIGNMENT == 0
        tensor.fill_(value)
    assert all((tensor == value).all() for value, tensor in enumerate(found))
    assert found[0].untyped_storage().data_ptr() == found[3].untyped_storage().data_ptr()


def test_an_arena_serves_several_threads():
    arena, found = HostArena(), []

    def take(value):
        for _ in range(50):
            tensor = arena.empty(1000)
            tensor.fill_(value)
            found.append((value, tensor))

    threads = [Thread(target=take, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200
    assert all((tensor == value).all() for value, tensor in found)


def test_a_chunk_ends_with_its_last_tensor(monkeypatch):
    chunks, real = [], mmap.mmap

    def seen(*arguments, **keywords):
        made = real(*arguments, **keywords)
        chunks.append(weakref.ref(made))
        return made

    monkeypatch.setattr(mmap, "mmap", seen)
    arena = HostArena()
    first, second = arena.empty(CHUNK - 64), arena.empty(64)
    arena.empty(CHUNK)
    assert len(chunks) == 2
    del first
    gc.collect()
    assert chunks[0]() is not None
    second.fill_(1)
    del second
    gc.collect()
    assert chunks[0]() is None
