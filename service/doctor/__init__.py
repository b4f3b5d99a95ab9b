"""`giantleap doctor`: what an operator asks after an installation. `giantleap.service.doctor.examination` runs it."""
