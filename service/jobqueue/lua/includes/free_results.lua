-- @include add_blob_bytes
local function result_bytes(id) return tonumber(redis.call('HGET', prefix .. ':blob_sizes', id) or 0) end

-- Gives up the blobs of an ended job: its results, or the input of one that failed for good.
local function free_results(id)
  local bytes = result_bytes(id)
  if bytes == 0 then return end
  add_blob_bytes(-bytes)
  redis.call('HDEL', prefix .. ':blob_sizes', id)
  redis.call('ZREM', prefix .. ':blob_results', id)
  redis.call('UNLINK', prefix .. ':result:' .. id, prefix .. ':input:' .. id)
end
