"""A model: its files, its base and live weights, and how it computes as a member, or as many at once."""
