-- Adds an event to a job, unless the claim is lost.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  the claim (see claim_fence), name, data (JSON text)
-- Reply    nothing
-- @include claim_fence
-- @include is_final
-- @include add_event

if owns(args.consumer, args) and not is_final(get(args.id, 'state')) then add_event(args.id, args.name, args.data) end
