-- @include prefix
local function add_blob_bytes(change) redis.call('INCRBY', prefix .. ':blob_bytes', string.format('%.0f', change)) end
