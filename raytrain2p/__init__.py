"""Two-phase training of multimodal language models, from a laptop to a Ray cluster."""

import sys

from raytrain2p.interrupts import end_at_once, handle

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"] or sys.argv[0].endswith("/bin/raytrain2p"):  # imported by Python as the package of a command
    handle(end_at_once)
