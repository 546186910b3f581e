"""trak: which training examples made this model predict that?

:class:`TRAKer` is the whole of the everyday interface.
"""

from trak._version import __version__
from trak.traker import TRAKer

__all__ = ["TRAKer", "__version__"]
