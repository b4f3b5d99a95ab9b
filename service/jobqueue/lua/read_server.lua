-- Reads how the server is and treats its data. Writes nothing. What its user may not read is absent.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- Reply    the fields of INFO below
local info = {}
for _, section in ipairs({'server', 'memory', 'persistence', 'replication'}) do
  local text = redis.pcall('INFO', section)
  if type(text) == 'string' then
    for name, value in string.gmatch(text, '([%w_]+):([^\r\n]*)') do info[name] = value end
  end
end
return cjson.encode({
  redis_version = info.redis_version,
  role = info.role,
  used_memory = info.used_memory,
  maxmemory = info.maxmemory,
  total_system_memory = info.total_system_memory,
  maxmemory_policy = info.maxmemory_policy,
  aof_enabled = info.aof_enabled,
  aof_last_write_status = info.aof_last_write_status,
})
