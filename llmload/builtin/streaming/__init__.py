"""The loader that reads each tensor once."""
