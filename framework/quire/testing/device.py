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

    def test_runner(self, device: Device) -> None:
        """Work runs eagerly without a key, and gives its result for every key that is offered.

        If it fails: `run(None, work)` returns `work()`; for a key return what the captured work returns, after every
        replay.
        """
        runner = device.graph_runner()
        assert runner.run(None, lambda: 7) == 7
        x = torch.ones(2, device=device.torch_device())
        keys = runner.keys()
        for key in keys:
            assert float(runner.run(key, lambda: x + 1).sum()) == 4.0
