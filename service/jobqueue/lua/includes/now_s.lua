-- @include clock
local now_s = string.format('%.6f', now_us / 1000000)
