-- ARGV: destination, then for each copy: id, state.
local destination = ARGV[1]
local count = 0
for i = 2, #ARGV, 2 do
  local id = ARGV[i]
  redis.call('ZREM', 'smtpdup:busy:' .. destination, id)
  redis.call('HDEL', 'smtpdup:holders:' .. destination, id)
  if redis.call('ZSCORE', 'smtpdup:pending:' .. destination, id) then
    redis.call('HSET', 'smtpdup:own:' .. destination, id, ARGV[i + 1])
    count = count + 1
  end
end
return count
