-- @include prefix
-- @include config
local function add_event(id, name, data)
  redis.call('XADD', prefix .. ':events:' .. id, 'MAXLEN', config.event_limit, '*', 'name', name, 'data', data)
end
