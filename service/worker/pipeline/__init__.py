"""What a worker does beside the device's work: claims for the next batch, and the ends of those that ran."""
