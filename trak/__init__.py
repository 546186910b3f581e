"""trak: which training examples made this model predict that?

:class:`TRAKer` is the whole of the everyday interface.
"""

from trak._estimate import estimate
from trak._version import __version__
from trak.traker import TRAKer
from trak.utils import test_install

__all__ = ["TRAKer", "__version__", "estimate", "test_install"]
