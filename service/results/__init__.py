"""Where results and large inputs lie when not in Redis: files or S3. Start at `giantleap.service.results.store`."""
