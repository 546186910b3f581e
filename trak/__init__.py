"""trak: which training examples made this model predict that?"""

from trak._version import __version__

__all__ = ["__version__"]
