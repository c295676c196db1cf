"""The examples in docstrings run, in a process without the shape checker.

The checker wraps every function, and doctest then no longer takes it for one of the module's own.
"""

import subprocess
import sys

from tests.contract.source_tree import ROOT, shipped_files

RUN_EXAMPLES = """
import doctest, importlib, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    if result.failed:
        print("RED", name, result)
"""


def test_docstring_examples() -> None:
    modules = [file.module for file in shipped_files() if ">>> " in file.text]
    done = subprocess.run(
        [sys.executable, "-c", RUN_EXAMPLES, *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "", done.stdout[-5000:]
