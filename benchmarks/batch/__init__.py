"""Images per second of `giantleap batch` with two processes, beside Ray Data with two actors."""
