-- ARGV: destination, worker. Ends its leases; it stays the holder, so that the next claim names it. Returns their number.
local holders = redis.call('HGETALL', 'smtpdup:holders:' .. ARGV[1])
local count = 0
for i = 1, #holders, 2 do
  if string.match(holders[i + 1], '^%S*') == ARGV[2] then
    count = count + redis.call('ZREM', 'smtpdup:busy:' .. ARGV[1], holders[i])
  end
end
return count
