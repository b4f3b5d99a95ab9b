-- @include prefix
local function blob_bytes() return tonumber(redis.call('GET', prefix .. ':blob_bytes') or 0) end
