"""Layers that model families are put together from."""
