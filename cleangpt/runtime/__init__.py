"""Devices, seeds and the state of modules."""
