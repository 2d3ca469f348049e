"""``python -m attnopt``."""

import sys

from attnopt.cli.main import main

sys.exit(main())
