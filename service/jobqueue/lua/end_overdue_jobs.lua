-- Fails the jobs whose deadline has passed.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  id of a job to look at first, optional
-- Reply    nothing
-- @include arguments
-- @include end_overdue
-- @include outage

serves_since_ms()
local id = args.id
local state = id and get(id, 'state')
if state and not is_final(state) and is_overdue(id) then close_overdue(id, '{}') end
end_overdue()
