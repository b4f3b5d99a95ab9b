"""The HTTP API. Start at `giantleap.service.api.app.create_app`."""
