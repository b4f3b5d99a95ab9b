"""The list of a caller's own jobs, newest first, in pages: the script that reads one, and what it gives.

The index is kept by `scripts_producer.ENQUEUE`; a job leaves it when its record has expired, and the oldest leave it
beyond its cap. `giantleap.service.jobqueue.producer.JobProducer.list_jobs` runs the script.
"""

from dataclasses import dataclass

from giantleap.service.jobs.job import JobRecord

MAX_PER_PAGE = 100
CURSOR_PATTERN = r"^[0-9]{1,17}$"  # \d would also be the digits of other scripts

# ARGV: limits, owner, state or '', most records, place to go on after or ''. Replies {records as of READ, the place to
# go on after or ''}. Forgets jobs whose record has expired.
LIST = """
local list, state, most = P .. ':jobs:' .. ARGV[2], ARGV[3], tonumber(ARGV[4])
local below = ARGV[5] == '' and '+inf' or '(' .. ARGV[5]
local found, last = {}, ''
while true do
  local rows = redis.call('ZREVRANGEBYSCORE', list, below, '-inf', 'WITHSCORES', 'LIMIT', 0, 100)
  if #rows == 0 then return {found, ''} end
  for i = 1, #rows, 2 do
    local id = rows[i]
    local known = get(id, 'state')
    if not known then
      redis.call('ZREM', list, id)
    elseif state == '' or known == state then
      if #found == most then return {found, last} end
      found[#found + 1] = record(id)
    end
    last = rows[i + 1]
  end
  below = '(' .. last
end
"""


@dataclass(frozen=True, slots=True)
class Page:
    """Some jobs, and where the next ones begin; `next_cursor` is None at the end."""

    records: tuple[JobRecord, ...]
    next_cursor: str | None
