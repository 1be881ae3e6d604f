"""Evaluating a run's weights or a model, as a command; see command.py."""
