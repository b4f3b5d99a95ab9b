-- @include prefix
-- @include group
local function ensure_group(lane)
  local stream = prefix .. ':stream:' .. lane
  if redis.call('EXISTS', stream) == 0 then
    redis.call('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
  end
  redis.call('SADD', prefix .. ':lanes', lane)
end
