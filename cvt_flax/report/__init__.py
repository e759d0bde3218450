"""A run as a page: curves, confusion, mistakes, attention; python -m cvt_flax.report RUN."""
