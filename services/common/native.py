"""Marks for mypyc, which compiles the modules that every request runs through (deploy/embedded/native.py).

They change nothing where Python runs the source: mypyc reads them, and no service needs its package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mypy_extensions import mypyc_attr, trait
else:

    def mypyc_attr(**_attributes):
        """Leave the class as it is."""
        return lambda cls: cls

    def trait(cls):
        """Leave the class as it is."""
        return cls


__all__ = ["mypyc_attr", "trait"]
