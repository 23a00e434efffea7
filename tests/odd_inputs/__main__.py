"""Run odd inputs: see tests/odd_inputs/__init__.py."""

import sys

from tests.odd_inputs import main

sys.exit(main())
