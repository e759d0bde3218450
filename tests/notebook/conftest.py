"""The tiny run of tests/training."""

from tests.training.conftest import config, config_file, npz, trained  # noqa: F401  (fixtures)
