"""How sketches are summed: torch operations that run anywhere, and faster back ends.

Which random numbers make a sketch is in ``trak._signs``; what is here only adds them up,
and every back end adds up the same ones.
"""
