"""`python -m genie_tk_jax` is the `genie-tk-jax` command."""

import sys

from genie_tk_jax.cli import main

sys.exit(main())
