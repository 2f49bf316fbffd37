-- ARGV: destination, job, worker, seconds of the lease, ids. Returns {id, verdict, accepted, state} for what is claimed.
local destination, job, worker, lease = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local pending, own = 'smtpdup:pending:' .. destination, 'smtpdup:own:' .. destination
local busy, holders = 'smtpdup:busy:' .. destination, 'smtpdup:holders:' .. destination
local failed, failure = 'smtpdup:failed:' .. destination, 'smtpdup:failure:' .. destination
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local stamp = time[1] .. '.' .. string.format('%06d', time[2])

local function owner(state)
  return string.sub(state, 1, string.find(state, '\n', 1, true) - 1)
end

-- The recipients that failed join those still owed; a state without "o" owes all of them.
local function merged(state, other)
  local a = cjson.decode(string.sub(state, string.find(state, '\n', 1, true) + 1))
  local b = cjson.decode(string.sub(other, string.find(other, '\n', 1, true) + 1))
  if a.o and b.o then
    local seen = {}
    for _, n in ipairs(a.o) do seen[n] = true end
    for _, n in ipairs(b.o) do
      if not seen[n] then a.o[#a.o + 1] = n end
    end
  else
    a.o = nil
  end
  return job .. '\n' .. cjson.encode(a)
end

local result = {}
for i = 5, #ARGV do
  local id = ARGV[i]
  local leased = redis.call('ZSCORE', busy, id)
  -- A lease of our own is one whose answer was lost: the courier does not ask for what it knows that it holds.
  local free = not leased or tonumber(leased) <= now or redis.call('HGET', holders, id) == worker
  local verdict = 'claimed'
  local lost = redis.call('HGET', failure, id)
  local requeued = lost and owner(lost) == job
  if requeued then
    if free then
      local state = redis.call('HGET', own, id)
      if redis.call('ZSCORE', pending, id) then
        state = state and merged(state, lost) or ''
      else
        state = lost
      end
      redis.call('ZADD', pending, stamp, id)
      if state == '' then
        redis.call('HDEL', own, id)
      else
        redis.call('HSET', own, id, state)
      end
      redis.call('ZREM', failed, id)
      redis.call('HDEL', failure, id)
      verdict = 'retried'
    else
      result[#result + 1] = {id, 'later', '0', ''}
    end
  end
  local accepted = free and redis.call('ZSCORE', pending, id)
  if accepted then
    local state = redis.call('HGET', own, id)
    if not state or owner(state) == '' or owner(state) == job then
      redis.call('ZADD', busy, now + lease, id)
      redis.call('HSET', holders, id, worker)
      result[#result + 1] = {id, verdict, accepted, state or ''}
    end
  end
end
return result
