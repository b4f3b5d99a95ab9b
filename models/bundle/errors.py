"""The errors of bundles. `models/bundle/bundle.py` exports them."""


class BundleError(ValueError):
    """A bundle that cannot be served; the message says why."""


class SizeError(BundleError):
    """A size or scale that a bundle does not support; the message names supported ones."""


class MethodError(BundleError):
    """A method that a bundle does not have; the message says why and names those that it has."""
