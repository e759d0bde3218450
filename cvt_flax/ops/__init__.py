"""Pure functions on arrays, each with its gradient."""
