"""The version, in a module of its own so that `dflash --version` and the build import nothing else."""

__version__ = "0.1.0"
