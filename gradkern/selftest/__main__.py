"""`python -m gradkern.selftest`."""

from __future__ import annotations

import sys

from gradkern.selftest import main

sys.exit(main())
