"""Sample plugins, never changed again: they stand for those that others wrote."""
