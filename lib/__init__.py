"""What the stages share. Whichever part is loaded first, signals are answered from then on."""

import lib.program  # noqa: F401
