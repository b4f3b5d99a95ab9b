-- @include arguments
-- @include group
-- @include get

-- The fence before every write of a worker: its claim must be the current one.
-- Arguments: consumer, lane, message, id, delivery.
local function owns_claim()
  local pending = redis.call('XPENDING', prefix .. ':stream:' .. args.lane, GROUP, args.message, args.message, 1)
  local owned = #pending == 1 and pending[1][2] == args.consumer
  return owned and tonumber(get(args.id, 'deliveries')) == args.delivery
end
