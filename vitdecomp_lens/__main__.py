"""``python -m vitdecomp_lens``."""

import sys

from vitdecomp_lens.cli import main

sys.exit(main())
