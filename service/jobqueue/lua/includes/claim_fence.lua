-- @include arguments
-- @include get
-- @include lane_of

-- The fence before every write of a worker: its claim must be the current one. The record says whose the job is; the
-- group, which says it too, may have been destroyed. Arguments: consumer, lane, message, id, delivery.
local function owns(consumer, claim)
  local worker, deliveries = unpack(redis.call('HMGET', job_key(claim.id), 'worker', 'deliveries'))
  return worker == consumer and tonumber(deliveries) == claim.delivery and lane_of(claim.id) == claim.lane
end
