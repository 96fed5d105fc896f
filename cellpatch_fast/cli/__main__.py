"""``python -m cellpatch_fast.cli`` is the command ``cellpatch``."""

import sys

from . import main

sys.exit(main())
