-- Pays for one request of an owner: the requests of one minute may come at once, after them one at each interval. A
-- refused request costs nothing.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  owner, per_minute
-- Reply    wait_us until the owner may send again; 0 if the request is paid
-- @include arguments
-- @include prefix
-- @include pay
-- @include wait_us

local key, interval_us = prefix .. ':rate:' .. args.owner, 60000000 / args.per_minute
local left_us = wait_us(key, interval_us)
if left_us >= 1 then return cjson.encode({wait_us = left_us}) end
pay(key, interval_us)
return '{"wait_us":0}'
