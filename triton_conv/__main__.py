"""`python -m triton_conv`, the same as the console script `triton-conv`."""

import sys

from .cli import main

sys.exit(main())
