-- ARGV: destination, job, worker, seconds of the lease, ids. Returns {id, verdict, accepted, state, before, size} for
-- what is claimed; "before" is the worker that had it in hand and never said what became of it, "" for none; "size" is
-- that of the record, 0 where there is none.
local destination, job, worker, lease = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local pending, own = 'smtpdup:pending:' .. destination, 'smtpdup:own:' .. destination
local busy, holders = 'smtpdup:busy:' .. destination, 'smtpdup:holders:' .. destination
local failed, failure = 'smtpdup:failed:' .. destination, 'smtpdup:failure:' .. destination
local now, stamp = clock()

local function owner(state)
  return string.sub(state, 1, (string.find(state, '\n', 1, true) or 1) - 1)
end

local function size_of(id)
  local size = redis.pcall('STRLEN', 'smtpdup:message:' .. id)
  return type(size) == 'number' and size or 0  -- else it is another type of key
end

local ids = {}
for i = 5, #ARGV do ids[i - 4] = ARGV[i] end
local accepted_at = redis.call('ZMSCORE', pending, unpack(ids))
local leases = redis.call('ZMSCORE', busy, unpack(ids))
local states = redis.call('HMGET', own, unpack(ids))
local failures = redis.call('HMGET', failure, unpack(ids))
local hands = redis.call('HMGET', holders, unpack(ids))
local result, leased, held = {}, {}, {}
for i, id in ipairs(ids) do
  -- A lease of the same worker is one whose reply was lost: the courier does not claim what it holds. A holder is
  -- "<worker>", or "<worker> <before>" for a copy taken over, so that a lost reply can be given again.
  local lease_end = leases[i]
  local holder, before = '', ''
  if hands[i] then
    holder, before = string.match(hands[i], '^(%S*) ?(.*)$')
  end
  if holder ~= worker then before = holder end
  local free = not lease_end or tonumber(lease_end) <= now or holder == worker
  local accepted, state, lost = accepted_at[i], states[i], failures[i]
  local verdict = 'claimed'
  if lost and owner(lost) == job then
    if free then
      if not accepted then
        state = lost
      elseif state then
        state = job .. '\n' .. joined(state, lost)  -- the recipients that failed join those still owed
      end
      accepted = stamp
      redis.call('ZADD', pending, stamp, id)
      if state then redis.call('HSET', own, id, state) end
      redis.call('ZREM', failed, id)
      redis.call('HDEL', failure, id)
      verdict = 'retried'
    else
      result[#result + 1] = {id, 'later', '0', '', '', 0}
    end
  end
  if free and accepted and (not state or owner(state) == '' or owner(state) == job) then
    leased[#leased + 1] = now + lease
    leased[#leased + 1] = id
    held[#held + 1] = id
    held[#held + 1] = before == '' and worker or worker .. ' ' .. before
    result[#result + 1] = {id, verdict, accepted, state or '', before, size_of(id)}
  end
end
if #held > 0 then
  redis.call('ZADD', busy, unpack(leased))
  redis.call('HSET', holders, unpack(held))
end
-- How the ledger itself stands, see ledger.heard: first, and under no id.
redis.call('HINCRBY', 'smtpdup:ledger', 'count', 1)
local ledger = redis.call('HMGET', 'smtpdup:ledger', 'id', 'count', 'doubt')
table.insert(result, 1, {'', ledger[1] or '', ledger[2], ledger[3] or '0', stamp})
return result
