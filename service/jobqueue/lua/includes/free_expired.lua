-- @include clock
-- @include free_results

local function free_expired()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', prefix .. ':blob_results', '-inf', now_ms)) do free_results(id) end
end
