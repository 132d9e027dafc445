"""Conformance of devices: plausible memory, buffers that copy, a runner that runs."""

from __future__ import annotations

import pytest
import torch

from quire.contract.device import Device, DeviceInit


class DeviceConformance:
    """What every device must hold. Subclass, and give the fixture `device_class`."""

    @pytest.fixture
    def device_class(self) -> type[Device]:
        """The class under test."""
        raise pytest.UsageError("define the fixture `device_class`")

    @pytest.fixture
    def device(self, device_class: type[Device]) -> Device:
        return device_class(DeviceInit())

    def test_memory(self, device: Device) -> None:
        """Free memory is positive and no more than there is.

        If it fails: both are bytes of this device; where the system limits the process further, the limit is the total.
        """
        memory = device.memory()
        assert 0 < memory.free <= memory.total

    def test_dtypes_compute(self, device: Device) -> None:
        """Every listed dtype multiplies; float32 is among them.

        If it fails: list only what the device computes, best first.
        """
        assert torch.float32 in device.dtypes()
        for dtype in device.dtypes():
            x = torch.ones(8, 8, dtype=dtype, device=device.torch_device())
            assert float((x @ x)[0, 0]) == 8.0

    def test_host_buffers(self, device: Device) -> None:
        """A host buffer is zeroed, lives on the CPU, and copies to the device.

        If it fails: make it with torch.zeros on the CPU (pinned where that exists), and let `synchronize` wait for all
        work.
        """
        buffer = device.host_buffer((3, 2), torch.int32)
        assert buffer.device.type == "cpu"
        assert buffer.tolist() == [[0, 0]] * 3
        buffer[1, 1] = 5
        copied = buffer.to(device.torch_device(), non_blocking=True)
        device.synchronize()
        assert int(copied.sum()) == 5

    def test_zeros(self, device: Device) -> None:
        """Memory for caches is zeroed, on the device, and each tensor's own.

        If it fails: leave `zeros` to the base class.
        """
        first, second = (device.zeros((3, 2, 5), torch.bfloat16) for _ in range(2))
        assert (first.shape, first.dtype, first.device.type) == (
            (3, 2, 5),
            torch.bfloat16,
            device.torch_device().type,
        )
        first.fill_(1.0)
        assert not second.any()
        assert first.all()

    def test_runner(self, device: Device) -> None:
        """Work runs eagerly without a key, and gives its result for every key that is offered, each time anew.

        If it fails: `run(None, work)` returns `work()`; for a key return what the captured work returns, after every
        replay. `replay(key)` gives the same as `run` or None.
        """
        runner = device.graph_runner()
        assert runner.run(None, lambda: 7) == 7
        x = torch.ones(2, device=device.torch_device())
        keys = sorted(runner.keys(), key=lambda key: key.num_tokens, reverse=True)
        for key in keys:
            runner.capture(key, lambda: x + 1)
            assert float(runner.run(key, lambda: x + 1).sum()) == 4.0
        for value in (3.0, 5.0, 7.0):  # the same address, another content; a lazy runner replays in the end
            x.fill_(value)
            for key in keys:
                assert float(runner.run(key, lambda: x + 1).sum()) == 2 * (value + 1)
        x.fill_(9.0)
        for key in keys:
            replayed = runner.replay(key)
            assert replayed is None or float(replayed.sum()) == 20.0

    def test_copies_to_the_host(self, device: Device) -> None:
        """A copy brings what the device had computed when it was started, on the CPU; an empty one waits for that work.

        If it fails: start it behind the work of the current stream, keep the source's memory from others until it has
        ended, and let `wait` return when it has.
        """
        at = device.torch_device()
        copies = [
            device.copy_to_host([torch.full((50_000,), value, device=at) * 2, torch.ones(3, device=at)])
            for value in range(4)
        ]
        for value, copy in enumerate(copies):
            first, second = copy.wait()
            assert first.device.type == second.device.type == "cpu"
            assert (first == 2 * value).all()
            assert second.tolist() == [1.0] * 3
        assert device.copy_to_host([]).wait() == ()

    def test_peak_memory(self, device: Device) -> None:
        """What work takes for a while is 0 where it is not measured, and of the work's size where it is.

        If it fails: measure by the allocator's own account, from before the work to its peak.
        """
        peak = device.peak_memory(lambda: torch.zeros(1 << 26, dtype=torch.uint8, device=device.torch_device()))
        assert peak == 0 or 1 << 26 <= peak < 1 << 28
