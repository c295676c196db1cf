"""A finished student for use elsewhere: ``python -m distillation.export RUN --output DIR``.

``exporting.py`` has the order of things, ``gpt2.py``, ``gguf_file.py`` and ``onnx_graph.py`` one
format each. Every format is read back and compared with the student before the folder appears.
"""

from distillation.export.command import build_parser, main

__all__ = ["build_parser", "main"]
