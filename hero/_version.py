"""The version, in a module without imports so that ``setup.py`` can read it as text."""

__version__ = "0.2.0"
