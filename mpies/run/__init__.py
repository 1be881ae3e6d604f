"""A run around its generations: set-up, resuming, stopping, recording, display."""
