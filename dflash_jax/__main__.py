"""`python -m dflash_jax` is the `dflash` command."""

import sys

from dflash_jax.cli import main

sys.exit(main())
