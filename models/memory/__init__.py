"""How much device memory a request needs."""
