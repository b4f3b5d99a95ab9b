"""Claiming: a claim with its inputs, and retries while Redis is unavailable."""
