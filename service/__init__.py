"""The running system: HTTP API, Redis job queue and GPU worker. Start reading at `service.api.create_app`."""
