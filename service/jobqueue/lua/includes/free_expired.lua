-- @include add_blob_bytes
-- @include clock
local function blob_bytes() return tonumber(redis.call('GET', prefix .. ':blob_bytes') or 0) end
local function result_bytes(id) return tonumber(redis.call('HGET', prefix .. ':blob_sizes', id) or 0) end

local function free_results(id)
  add_blob_bytes(-result_bytes(id))
  redis.call('HDEL', prefix .. ':blob_sizes', id)
  redis.call('ZREM', prefix .. ':blob_results', id)
  redis.call('UNLINK', prefix .. ':result:' .. id)
end

local function free_expired()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', prefix .. ':blob_results', '-inf', now_ms)) do free_results(id) end
end
