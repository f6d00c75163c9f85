"""The words every other package shares. Imports nothing of ours, no torch and no ray."""
