-- @include prefix
-- @include config
local function add_event(id, name, data)
  return redis.call('XADD', prefix .. ':events:' .. id, 'MAXLEN', config.event_limit, '*', 'name', name, 'data', data)
end
