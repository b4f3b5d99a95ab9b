-- @include get
local function get_number(id, field) return tonumber(get(id, field) or 0) end
