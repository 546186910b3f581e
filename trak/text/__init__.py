"""Which training texts made a language model say this?

:class:`TextAttributor` takes strings: it tokenizes, featurizes, generates and scores.
"""

from trak.text._attributor import TextAttributor
from trak.text._explanation import Explanation, Ranking

__all__ = ["Explanation", "Ranking", "TextAttributor"]
