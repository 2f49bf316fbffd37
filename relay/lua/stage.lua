-- ARGV: for each message: id, its owner's deadline, record.
-- Listed before it is written: a body that nobody lists is a leak.
for i = 1, #ARGV, 3 do
  redis.call('ZADD', 'smtpdup:staged', ARGV[i + 1], ARGV[i])
  redis.call('SET', 'smtpdup:message:' .. ARGV[i], ARGV[i + 2])
end
return #ARGV / 3
