"""A run around its generations: set up, gone on with, stopped, recorded, shown."""
