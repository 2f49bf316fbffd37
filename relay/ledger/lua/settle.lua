-- ARGV: destination, seconds of noise, ids. A body is deleted when its id is neither pending nor failed anywhere. Without
-- "turned" none of these copies is counted in a group of divergence.
local destination = ARGV[1]
local pending, own = 'smtpdup:pending:' .. destination, 'smtpdup:own:' .. destination
local ids = {}
for i = 3, #ARGV do ids[i - 2] = ARGV[i] end
redis.call('ZREM', 'smtpdup:busy:' .. destination, unpack(ids))
redis.call('HDEL', 'smtpdup:holders:' .. destination, unpack(ids))
local count = redis.call('ZREM', pending, unpack(ids))
if count == 0 then
  return 0
end
if redis.call('EXISTS', own) == 1 then
  if turned then
    for _, state in ipairs(redis.call('HMGET', own, unpack(ids))) do
      if state then turned(destination, {state}, {}, 'resolved', tonumber(ARGV[2])) end
    end
  end
  redis.call('HDEL', own, unpack(ids))
end
local lists = {}
if count < #ids then
  -- Checked again: after a failover, the other copies may become pending once more, and need their bodies.
  lists = {'smtpdup:staged', 'smtpdup:uncertain'}
end
local names, whole = destinations()
for _, other in ipairs(names) do
  -- They have just left our own pending list, which may be long.
  if other ~= destination then lists[#lists + 1] = 'smtpdup:pending:' .. other end
  lists[#lists + 1] = 'smtpdup:failed:' .. other
end
for _, list in ipairs(lists) do
  if #ids > 0 and redis.call('EXISTS', list) == 1 then
    local wanted = redis.call('ZMSCORE', list, unpack(ids))
    local rest = {}
    for i, id in ipairs(ids) do
      if not wanted[i] then rest[#rest + 1] = id end
    end
    ids = rest
  end
end
if #ids > 0 and not whole then
  redis.call('SADD', 'smtpdup:kept', unpack(ids))
elseif #ids > 0 then
  for i, id in ipairs(ids) do ids[i] = 'smtpdup:message:' .. id end
  redis.call('DEL', unpack(ids))
end
redis.call('HINCRBY', 'smtpdup:counters', 'delivered:' .. destination, count)
return count
