-- @include claim_fence
-- @include clock
-- @include get_number

-- Records the seconds that the job took of its worker, for estimates, without those that its claim waited for the batch
-- (`idle_s`). The jobs of one batch share its time.
local function add_duration(list, max_entries)
  local held_s = now_us / 1000000 - get_number(args.id, 'begun_s')
  local duration_s = math.max(0, held_s - args.idle_s) / args.batch_jobs
  redis.call('LPUSH', list, string.format('%.6f', duration_s))
  redis.call('LTRIM', list, 0, max_entries - 1)
end
