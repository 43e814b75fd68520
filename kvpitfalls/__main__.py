"""``python -m kvpitfalls``."""

import sys

from .cli import main

sys.exit(main())
