"""Environments: what a model acts in over several turns, the user's code, in processes beside the rank."""
