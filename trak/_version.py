"""The version, where the build and the store's manifest both read it."""

__version__ = "1.0.0"
