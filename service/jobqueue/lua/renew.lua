-- Renews the leases of a worker and its heartbeat. The owner is checked before XCLAIM: an unconditional one would take
-- a message back from its new owner. FORCE: the group may be a new one.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  consumer, device and role as for register_worker, claims (lane, message, id, delivery)
-- Reply    ids of the jobs whose claim is lost
-- @include arguments
-- @include claim_fence
-- @include ensure_group
-- @include heartbeat
-- @include outage

heartbeat(args.consumer, args.device, args.role)
serves_since_ms()
local lost = {}
for _, claim in ipairs(args.claims) do
  if owns(args.consumer, claim) then
    ensure_group(claim.lane)
    local message = get(claim.id, 'message') or claim.message
    redis.call('XCLAIM', stream_key(claim.lane), GROUP, args.consumer, 0, message, 'FORCE', 'JUSTID')
  else
    lost[#lost + 1] = claim.id
  end
end
return cjson.encode({ids = #lost > 0 and lost or nil})  -- cjson writes an empty table as {}
