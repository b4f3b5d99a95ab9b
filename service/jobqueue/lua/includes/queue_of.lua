-- @include job_key

-- The queue in which a job waits, and its priority. The field `part` is '', '+finish' or absent.
local function queue_of(id)
  local bundle, part, priority = unpack(redis.call('HMGET', job_key(id), 'bundle', 'part', 'priority'))
  return bundle .. (part or ''), priority
end
