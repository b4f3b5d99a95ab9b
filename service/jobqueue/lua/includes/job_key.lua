-- @include prefix
local function job_key(id) return prefix .. ':job:' .. id end
