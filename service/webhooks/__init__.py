"""Signed webhooks: which hosts may be called, and who calls them."""
