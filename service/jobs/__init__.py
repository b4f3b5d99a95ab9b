"""What a job is and what it may ask of a worker: values and pure decisions, without Redis or HTTP."""
