"""Which requests for a new job may ask a crowded queue at all."""
