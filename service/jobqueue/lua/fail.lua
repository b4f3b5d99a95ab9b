-- Ends an attempt with an error: the job is delayed for a retry or fails for good. A job whose cancellation was
-- requested is canceled instead.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  the claim (see claim_fence), error and stages (JSON texts), retryable, refused (the job
--          did what it was to do, and its image is not wanted: no dead letter, nothing to retry)
-- Reply    status: done, retried, canceled, lost
-- @include settle_canceled
-- @include close_failed

local id, stages, delivery = args.id, args.stages, args.delivery
if not owns_claim() then return reply_not_owned() end
if end_if_overdue(stages) then return reply('lost') end
local canceled = settle_canceled(stages)
if canceled then return canceled end
if args.retryable and delivery < config.max_deliveries then
  local delay_ms = math.min(config.backoff_ms * 2 ^ (delivery - 1), config.backoff_cap_ms)
  redis.call('SREM', prefix .. ':running', id)
  redis.call('HSET', job_key(id), 'state', 'queued', 'error', args.error)
  redis.call('ZADD', prefix .. ':delayed', now_ms + delay_ms, id)
  add_event(id, 'retrying', string.format('{"delivery":%d,"delay_s":%.3f}', delivery, delay_ms / 1000))
  return settle('retried')
end
if args.refused then
  redis.call('HSET', job_key(id), 'error', args.error)
  close_job(id, 'failed', stages)
else
  close_failed(id, args.error, stages)
end
return settle('done')
