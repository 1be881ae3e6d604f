"""Engines turn prompts into completions with the live weights."""
