"""The bytes of FLUX.1 on the device by mode."""
