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
  state = string.sub(state, 1, string.find(state, '\n', 1, true)) .. joined(state, before)
end
local own = 'smtpdup:own:' .. destination
local was = redis.call('HGET', own, id) or ''
turned(destination, {was, before or ''}, {state, ARGV[4]}, 'resolved', tonumber(ARGV[5]))
redis.call('SADD', 'smtpdup:lists', destination)
local _, now = clock()
redis.call('ZADD', 'smtpdup:failed:' .. destination, now, id)
redis.call('HSET', 'smtpdup:failure:' .. destination, id, state)
redis.call('HINCRBY', 'smtpdup:counters', 'failed:' .. destination, 1)
if ARGV[4] == '' then
  redis.call('ZREM', 'smtpdup:pending:' .. destination, id)
  redis.call('HDEL', own, id)
else
  redis.call('HSET', own, id, ARGV[4])
end
return 1
