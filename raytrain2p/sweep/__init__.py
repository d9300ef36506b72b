import sys

import raytrain2p.launch  # noqa: F401  sets the variables that Ray reads while it is imported
from raytrain2p.sweep.api import SweepModule

sys.modules[__name__].__class__ = SweepModule
