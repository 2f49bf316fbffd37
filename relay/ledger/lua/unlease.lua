-- ARGV: destination, worker, ids. Ends its leases; what another has taken since is left alone: this may be repeated.
local holders = 'smtpdup:holders:' .. ARGV[1]
local count = 0
for i = 3, #ARGV do
  if string.match(redis.call('HGET', holders, ARGV[i]) or '', '^%S*') == ARGV[2] then
    count = count + redis.call('ZREM', 'smtpdup:busy:' .. ARGV[1], ARGV[i])
    redis.call('HDEL', holders, ARGV[i])
  end
end
return count
