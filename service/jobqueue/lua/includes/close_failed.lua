-- @include close_job

-- Fails a job for good and adds it to the dead-letter stream. Its input stays for another attempt, unless it is what a
-- worker generated for another to decode.
local function close_failed(id, error, stages)
  redis.call('HSET', job_key(id), 'error', error)
  close_job(id, 'failed', stages, not get(id, 'stages'))
  redis.call('XADD', prefix .. ':dead', 'MAXLEN', '~', 1000, '*', 'job', id, 'lane', lane_of(id),
    'deliveries', get_number(id, 'deliveries'), 'error', error)
end
