-- @include has_group
-- @include job_key
-- @include lane_of

-- Makes the stream of a lane and its group if they are missing. A stream that somebody deleted gets its jobs back: the
-- waiting ones in their order, then those that run, which `claim` returns to their workers.
local function ensure_group(lane)
  redis.call('SADD', prefix .. ':lanes', lane)
  if has_group(lane) then return end
  local stream = stream_key(lane)
  local is_lost = redis.call('EXISTS', stream) == 0
  redis.call('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
  if not is_lost then return end
  for _, id in ipairs(redis.call('ZRANGE', prefix .. ':queued:' .. lane, 0, -1)) do
    redis.call('XADD', stream, '*', 'job', id)
  end
  for _, id in ipairs(redis.call('SMEMBERS', prefix .. ':running')) do
    if redis.call('EXISTS', job_key(id)) == 1 and lane_of(id) == lane then
      redis.call('HSET', job_key(id), 'message', redis.call('XADD', stream, '*', 'job', id))
    end
  end
end
