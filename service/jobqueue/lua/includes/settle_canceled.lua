-- @include settle

-- Ends the job as canceled if a client has requested that, which was acknowledged: it must never end otherwise.
-- Returns the reply, or nil.
local function settle_canceled(stages)
  if not get(args.id, 'cancel') then return nil end
  close_job(args.id, 'canceled', stages)
  return settle('canceled')
end
