-- @include queue_of
local function lane_of(id)
  local queue, priority = queue_of(id)
  return queue .. ':' .. priority
end
