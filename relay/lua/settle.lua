-- ARGV: destination, ids. A body goes when no destination has its id pending or failed.
local destination = ARGV[1]
local others = redis.call('HKEYS', 'smtpdup:destinations')
local count = 0
for i = 2, #ARGV do
  local id = ARGV[i]
  redis.call('ZREM', 'smtpdup:busy:' .. destination, id)
  redis.call('HDEL', 'smtpdup:holders:' .. destination, id)
  if redis.call('ZREM', 'smtpdup:pending:' .. destination, id) == 1 then
    redis.call('HDEL', 'smtpdup:own:' .. destination, id)
    count = count + 1
    local wanted = false
    for _, other in ipairs(others) do
      if redis.call('ZSCORE', 'smtpdup:pending:' .. other, id) or redis.call('ZSCORE', 'smtpdup:failed:' .. other, id) then
        wanted = true
        break
      end
    end
    if not wanted then
      redis.call('DEL', 'smtpdup:message:' .. id)
    end
  end
end
if count > 0 then
  redis.call('HINCRBY', 'smtpdup:counters', 'delivered:' .. destination, count)
end
return count
