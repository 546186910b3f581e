"""Settings that count only before torch is imported; so this is imported first."""

import os

# Threads that spin while they wait make training many times slower as soon as another
# program wants the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
