"""``python -m fednano.host``."""

from __future__ import annotations

import sys

from fednano.host.cli import main

if __name__ == "__main__":
    sys.exit(main())
