"""The CPU as a device whose steps run eagerly."""

from __future__ import annotations

from quire.plugin import HostDevice, HostDeviceOptions


class CpuOptions(HostDeviceOptions):
    """Options of the `cpu` device."""


class CpuDevice(HostDevice):
    """The machine's processor and main memory."""
