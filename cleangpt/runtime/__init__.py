"""Devices, threads, seeds and the state of modules."""
