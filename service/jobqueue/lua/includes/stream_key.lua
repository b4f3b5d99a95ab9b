-- @include prefix
local function stream_key(lane) return prefix .. ':stream:' .. lane end
