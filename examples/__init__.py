"""Commands to run with `python -m examples.<name>`: thin mains over the library, not installed."""
