-- Reads the size of everything and releases the bytes of expired results.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- Reply    lanes (queue, priority, queued, median_s), processing, delayed, dead_lettered, oldest_age_us, live_workers,
--          generate_workers and decode_workers (of these roles), durations_s, blob_bytes
-- @include prefix
-- @include blob_bytes
-- @include config
-- @include free_expired
-- @include live_workers
-- @include median_duration_s

free_expired()
local lanes, oldest_us = {}, now_us
for _, name in ipairs(redis.call('SMEMBERS', prefix .. ':lanes')) do
  local key = prefix .. ':queued:' .. name
  local first = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  if first[2] then oldest_us = math.min(oldest_us, tonumber(first[2])) end
  local queue, priority = string.match(name, '^(.*):(.*)$')
  lanes[#lanes + 1] = {
    queue = queue, priority = priority, queued = redis.call('ZCARD', key), median_s = median_duration_s(queue),
  }
end
local durations_s = redis.call('LRANGE', prefix .. ':durations', 0, -1)
return cjson.encode({
  lanes = #lanes > 0 and lanes or nil,  -- cjson writes an empty table as {}
  processing = redis.call('SCARD', prefix .. ':running'),
  delayed = redis.call('ZCARD', prefix .. ':delayed'),
  dead_lettered = redis.call('XLEN', prefix .. ':dead'),
  oldest_age_us = now_us - oldest_us,
  live_workers = live_workers(),
  generate_workers = live_workers('generate'),
  decode_workers = live_workers('decode'),
  durations_s = #durations_s > 0 and durations_s or nil,
  blob_bytes = blob_bytes(),
})
