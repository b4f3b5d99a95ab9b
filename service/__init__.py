"""HTTP API, Redis job queue and GPU worker. Start reading at `giantleap.service.api.app.create_app`."""
