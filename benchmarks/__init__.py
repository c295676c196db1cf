"""Speed measurements of the library against the obvious loops; see README.md beside this file."""
