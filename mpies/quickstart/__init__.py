"""The command that fetches the embedded model, once: `python -m mpies.quickstart.fetch`."""
