"""Every dropout of a model set, in config, modules and attributes, and proved."""
