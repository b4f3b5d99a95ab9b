"""The durable job queue on Redis Streams: producer, consumer, records, blobs and their Lua scripts."""
