"""Signatures checked before a folder is read, and weights held to being finite."""
