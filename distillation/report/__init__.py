"""What a run was and what it made, for people: one HTML page, a comparison, a live view.

Everything is read from the run's files; nothing is measured and no model is loaded, so torch is
not needed here. ``run_files.py`` reads, ``figures.py`` draws through ``svg.py``, ``page.py`` and
``comparison.py`` put pages together, and ``watch.py`` follows a run that goes on.
"""
