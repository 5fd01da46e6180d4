"""Automated auxiliary learning on Ray (AANG, ICLR 2023)."""

__version__ = "0.1.0"
