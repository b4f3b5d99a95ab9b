-- @include group
-- @include stream_key

local function has_group(lane)
  local stream = stream_key(lane)
  if redis.call('EXISTS', stream) == 0 then return false end
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    for i = 1, #info, 2 do
      if info[i] == 'name' and info[i + 1] == GROUP then return true end
    end
  end
  return false
end
