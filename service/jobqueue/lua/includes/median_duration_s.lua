-- @include prefix

-- Median seconds of the recent jobs of a queue, or of all queues if it has none; nil before the first job ended.
local function median_duration_s(queue)
  local recent = redis.call('LRANGE', prefix .. ':durations:' .. queue, 0, -1)
  if #recent == 0 then recent = redis.call('LRANGE', prefix .. ':durations', 0, 30) end
  for i, text in ipairs(recent) do recent[i] = tonumber(text) end
  table.sort(recent)
  return recent[math.ceil(#recent / 2)]
end
