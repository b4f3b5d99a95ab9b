-- Reads how the server treats its data. Writes nothing. What its user may not read is absent.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- Reply    maxmemory_policy, aof_enabled (0 or 1)
local info = {}
for _, section in ipairs({'memory', 'persistence'}) do
  local text = redis.pcall('INFO', section)
  if type(text) == 'string' then
    for name, value in string.gmatch(text, '([%w_]+):([^\r\n]*)') do info[name] = value end
  end
end
return cjson.encode({maxmemory_policy = info.maxmemory_policy, aof_enabled = info.aof_enabled})
