-- Renews the leases of a worker and its heartbeat. The owner is checked before XCLAIM: an unconditional one would take
-- a message back from its new owner.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  consumer, device and role as for register_worker, claims (lane, message, id, delivery)
-- Reply    ids of the jobs whose claim is lost
-- @include arguments
-- @include group
-- @include heartbeat
-- @include get

heartbeat(args.consumer, args.device, args.role)
local lost = {}
for _, claim in ipairs(args.claims) do
  local stream = prefix .. ':stream:' .. claim.lane
  local pending = redis.call('XPENDING', stream, GROUP, claim.message, claim.message, 1)
  local owned = #pending == 1 and pending[1][2] == args.consumer
  if owned and tonumber(get(claim.id, 'deliveries')) == claim.delivery then
    redis.call('XCLAIM', stream, GROUP, args.consumer, 0, claim.message, 'JUSTID')
  else
    lost[#lost + 1] = claim.id
  end
end
return cjson.encode({ids = #lost > 0 and lost or nil})  -- cjson writes an empty table as {}
