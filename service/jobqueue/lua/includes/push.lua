-- @include lane_of
-- @include add_event
-- @include clock
-- @include ensure_group
-- @include position

-- Appends a job to the stream of its lane and returns its position.
local function push(id)
  local lane = lane_of(id)
  ensure_group(lane)
  redis.call('XADD', stream_key(lane), '*', 'job', id)
  redis.call('HSET', job_key(id), 'state', 'queued', 'queued_us', string.format('%.0f', now_us))
  redis.call('ZADD', prefix .. ':queued:' .. lane, now_us, id)
  local rank = position(id)
  add_event(id, 'queued', string.format('{"position":%d}', rank))
  return rank
end
