"""Measurements of the package; nothing here is shipped, and no test asserts a time."""
