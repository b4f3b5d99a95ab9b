-- Pays for one request of an owner, by the generic cell rate algorithm (ITU-T I.371, virtual scheduling): the requests
-- of one minute may come at once, after them one at each interval. A refused request costs nothing.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  owner, per_minute
-- Reply    wait_us until the owner may send again; 0 if the request is paid
-- @include prefix
-- @include arguments
-- @include clock

local key, interval_us = prefix .. ':rate:' .. args.owner, 60000000 / args.per_minute
local paid_us = math.max(tonumber(redis.call('GET', key) or 0), now_us) + interval_us
local wait_us = paid_us - now_us - 60000000
if wait_us >= 1 then return cjson.encode({wait_us = math.ceil(wait_us)}) end
redis.call('SET', key, string.format('%.0f', paid_us), 'PX', math.ceil((paid_us - now_us) / 1000))
return '{"wait_us":0}'
