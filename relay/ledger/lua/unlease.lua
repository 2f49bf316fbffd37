-- ARGV: destination, ids.
local count = 0
for i = 2, #ARGV do
  count = count + redis.call('ZREM', 'smtpdup:busy:' .. ARGV[1], ARGV[i])
  redis.call('HDEL', 'smtpdup:holders:' .. ARGV[1], ARGV[i])
end
return count
