-- Takes the deliveries that are due; each is hidden from other senders until its lease ends.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  max_deliveries, lease_ms, max_attempts
-- Reply    deliveries: id, attempt, url, job_id, state, bundle, finished_at_s, error (JSON text, optional),
--          results (JSON text)
-- @include prefix
-- @include arguments
-- @include clock

local taken = {}

local function drop(delivery, reason)
  redis.call('ZREM', prefix .. ':webhooks', delivery)
  redis.call('UNLINK', prefix .. ':webhook:' .. delivery)
  redis.call('XADD', prefix .. ':webhooks_dead', 'MAXLEN', '~', 1000, '*', 'delivery', delivery, 'reason', reason)
end

local due = redis.call('ZRANGEBYSCORE', prefix .. ':webhooks', '-inf', now_ms, 'LIMIT', 0, args.max_deliveries)
for _, delivery in ipairs(due) do
  local key = prefix .. ':webhook:' .. delivery
  if redis.call('EXISTS', key) == 0 then
    drop(delivery, 'expired')
  elseif tonumber(redis.call('HGET', key, 'attempts')) >= args.max_attempts then
    drop(delivery, 'its sender was lost each time')
  else
    local attempt = redis.call('HINCRBY', key, 'attempts', 1)
    redis.call('ZADD', prefix .. ':webhooks', now_ms + args.lease_ms, delivery)
    local url, job_id, state, bundle, finished_at_s, error, results =
      unpack(redis.call('HMGET', key, 'url', 'job', 'state', 'bundle', 'finished_at_s', 'error', 'results'))
    taken[#taken + 1] = {
      id = delivery, attempt = attempt, url = url, job_id = job_id, state = state, bundle = bundle,
      finished_at_s = finished_at_s, error = error ~= '' and error or nil,
      results = results or '[]',
    }
  end
end
return cjson.encode({deliveries = #taken > 0 and taken or nil})  -- cjson writes an empty table as {}
