"""What is wanted, as plain frozen data.

In comes a YAML or JSON file, a mapping or a spec made in Python; out goes a :class:`LoadSpec` or
:class:`GroupSpec` whose every key was checked, or all its faults at once, each with its place in
the file and the way out. Also the JSON schema. Nothing here imports torch or knows a plugin: the
models of plugins' sections are handed in.
"""
