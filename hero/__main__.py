"""``python -m hero`` is the ``hero`` command."""

import sys

from .cli import main

sys.exit(main())
