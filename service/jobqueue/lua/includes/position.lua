-- @include queue_of

-- The number of jobs that workers take before this one; nil if it does not wait in a stream.
local function position(id)
  local queue, priority = queue_of(id)
  local rank = redis.call('ZRANK', prefix .. ':queued:' .. queue .. ':' .. priority, id)
  if not rank then return nil end
  if priority == 'low' then rank = rank + redis.call('ZCARD', prefix .. ':queued:' .. queue .. ':high') end
  return rank
end
