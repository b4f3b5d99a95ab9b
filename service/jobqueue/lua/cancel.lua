-- Ends a claimed job as canceled.
--
-- KEYS[1]  the hash tag
-- ARGV[1]  the settings
-- ARGV[2]  the claim (see claim_fence), stages (JSON text)
-- Reply    status: done, lost
-- @include settle

if not owns_claim() then return reply_not_owned() end
if end_if_overdue(args.stages) then return reply('done') end
close_job(args.id, 'canceled', args.stages)
return settle('done')
