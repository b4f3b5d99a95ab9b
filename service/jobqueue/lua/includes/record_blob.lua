-- @include prefix
-- @include config
-- @include clock

-- Records a blob of an ended job, which expires, and is evicted before that if there is no room.
local function record_blob(id, bytes)
  redis.call('ZADD', prefix .. ':blob_results', string.format('%.3f', now_us / 1000 + config.ttl_ms), id)
  redis.call('HSET', prefix .. ':blob_sizes', id, bytes)
end
