-- Lists the devices of the live workers.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- Reply    devices: JSON texts
-- @include prefix
-- @include config
-- @include clock

local devices = {}
for _, consumer in ipairs(redis.call('ZRANGEBYSCORE', prefix .. ':workers', now_ms - config.visibility_ms, '+inf')) do
  devices[#devices + 1] = redis.call('HGET', prefix .. ':devices', consumer) or nil
end
return cjson.encode({devices = #devices > 0 and devices or nil})  -- cjson writes an empty table as {}
