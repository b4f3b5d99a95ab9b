"""Signed webhooks: allowed hosts and delivery."""
