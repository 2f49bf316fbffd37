-- ARGV: key of what this spool has brought in, then for each message: id, record. To be followed by release or hold
-- in the same MULTI. What is noted as brought in, pending or failed has been here: it stays as it is.
local time = redis.call('TIME')
local names = destinations()
local count = 0
for i = 2, #ARGV, 2 do
  local id = ARGV[i]
  local new = redis.call('ZADD', ARGV[1], 'NX', time[1], id) == 1
  if new and not is_listed(names, id) then
    redis.call('ZREM', 'smtpdup:uncertain', id)
    redis.call('HDEL', 'smtpdup:covered', id)
    redis.call('ZADD', 'smtpdup:staged', time[1], id)
    redis.call('SET', 'smtpdup:message:' .. id, ARGV[i + 1])
    count = count + 1
  end
end
return count
