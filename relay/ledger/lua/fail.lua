-- ARGV: destination, id, state of what failed, state of what stays pending ('' for nothing), seconds of noise.
local destination, id = ARGV[1], ARGV[2]
redis.call('ZREM', 'smtpdup:busy:' .. destination, id)
redis.call('HDEL', 'smtpdup:holders:' .. destination, id)
if not redis.call('ZSCORE', 'smtpdup:pending:' .. destination, id) then
  return 0
end
local state = ARGV[3]
local before = redis.call('HGET', 'smtpdup:failure:' .. destination, id)
if before then
  local head = string.sub(state, 1, string.find(state, '\n', 1, true))
  local a = cjson.decode(string.sub(state, string.find(state, '\n', 1, true) + 1))
  -- What cannot be read has failed for all.
  local sound, b = pcall(cjson.decode, string.sub(before, (string.find(before, '\n', 1, true) or 0) + 1))
  if a.o and sound and type(b) == 'table' and type(b.o) == 'table' then
    local seen = {}
    for _, n in ipairs(a.o) do seen[n] = true end
    for _, n in ipairs(b.o) do
      if not seen[n] then a.o[#a.o + 1] = n end
    end
  else
    a.o = nil
  end
  if sound and type(b) == 'table' then joined(a, b) end
  state = head .. cjson.encode(a)
end
local own = 'smtpdup:own:' .. destination
local was = redis.call('HGET', own, id) or ''
turned(destination, {was, before or ''}, {state, ARGV[4]}, 'resolved', tonumber(ARGV[5]))
redis.call('SADD', 'smtpdup:lists', destination)
local time = redis.call('TIME')
redis.call('ZADD', 'smtpdup:failed:' .. destination, time[1] .. '.' .. string.format('%06d', time[2]), id)
redis.call('HSET', 'smtpdup:failure:' .. destination, id, state)
redis.call('HINCRBY', 'smtpdup:counters', 'failed:' .. destination, 1)
if ARGV[4] == '' then
  redis.call('ZREM', 'smtpdup:pending:' .. destination, id)
  redis.call('HDEL', own, id)
else
  redis.call('HSET', own, id, ARGV[4])
end
return 1
