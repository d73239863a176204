"""`python -m foveal.runs` is the command `foveal`."""

import sys

from .cli import main

sys.exit(main())
