"""Kernel sources, compiled at run time."""
