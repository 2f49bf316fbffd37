-- ARGV: destination, seconds of noise, then for each copy: id, state.
local destination = ARGV[1]
local count = 0
for i = 3, #ARGV, 2 do
  local id = ARGV[i]
  redis.call('ZREM', 'smtpdup:busy:' .. destination, id)
  redis.call('HDEL', 'smtpdup:holders:' .. destination, id)
  if redis.call('ZSCORE', 'smtpdup:pending:' .. destination, id) then
    local own = 'smtpdup:own:' .. destination
    turned(destination, {redis.call('HGET', own, id) or ''}, {ARGV[i + 1]}, 'resolved', tonumber(ARGV[2]))
    redis.call('HSET', own, id, ARGV[i + 1])
    count = count + 1
  end
end
return count
