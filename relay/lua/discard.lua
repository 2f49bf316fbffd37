-- ARGV: ids.
local count = 0
for _, id in ipairs(ARGV) do
  if redis.call('ZREM', 'smtpdup:staged', id) + redis.call('ZREM', 'smtpdup:uncertain', id) > 0 then
    redis.call('DEL', 'smtpdup:message:' .. id)
    redis.call('HDEL', 'smtpdup:covered', id)
    count = count + 1
  end
end
return count
