-- @include get
-- @include clock
local function is_overdue(id)
  local deadline_ms = get(id, 'deadline_ms')
  return deadline_ms and tonumber(deadline_ms) <= now_ms
end
