"""The networks, as linen modules."""
