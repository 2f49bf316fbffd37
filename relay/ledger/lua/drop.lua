-- ARGV: destination, '1' to drop pending copies instead of failed ones, then for each: id, and its score as it was read or
-- ''. With a score, only an unchanged copy is deleted: one with another score was tried again, and a leased one may be
-- delivered at any moment. Returns the ids of those that are gone.
local destination = ARGV[1]
local list, states = 'smtpdup:failed:' .. destination, 'smtpdup:failure:' .. destination
local busy = 'smtpdup:busy:' .. destination
if ARGV[2] == '1' then
  list, states = 'smtpdup:pending:' .. destination, 'smtpdup:own:' .. destination
end
local now = clock()
local names, whole = destinations()
local gone = {}
for i = 3, #ARGV, 2 do
  local id = ARGV[i]
  local score, seen = redis.call('ZSCORE', list, id), ARGV[i + 1]
  local lease = ARGV[2] == '1' and redis.call('ZSCORE', busy, id)
  local same = tonumber(seen) == tonumber(score or 0) and not (lease and tonumber(lease) > now)
  if score and (seen == '' or same) then
    redis.call('ZREM', list, id)
    turned(destination, {redis.call('HGET', states, id) or ''}, {}, 'dropped', 0)
    redis.call('HDEL', states, id)
    if ARGV[2] == '1' then
      redis.call('ZREM', busy, id)
      redis.call('HDEL', 'smtpdup:holders:' .. destination, id)
    end
    gone[#gone + 1] = id
    if not is_listed(names, id) then forget_body(id, whole) end
  end
end
return gone
