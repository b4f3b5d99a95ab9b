"""The worker: claims batches, runs them on one device, finishes their jobs. Start at
`giantleap.service.worker.loop`."""
