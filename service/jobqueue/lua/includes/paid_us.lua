-- @include clock
-- Up to when a minute's allowance is paid, by the generic cell rate algorithm (ITU-T I.371, virtual scheduling): what
-- one minute allows may come at once.
local function paid_us(key) return math.max(tonumber(redis.call('GET', key) or 0), now_us) end
