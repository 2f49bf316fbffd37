-- ARGV: destination, worker. Ends its leases; it stays the holder, so that the next claim names it. Returns their ids.
local holders = redis.call('HGETALL', 'smtpdup:holders:' .. ARGV[1])
local ended = {}
for i = 1, #holders, 2 do
  if string.match(holders[i + 1], '^%S*') == ARGV[2] then
    if redis.call('ZREM', 'smtpdup:busy:' .. ARGV[1], holders[i]) == 1 then ended[#ended + 1] = holders[i] end
  end
end
return ended
