-- ARGV: id, then for each backup: name, state ('' when all its recipients are owed).
local id = ARGV[1]
if redis.call('ZREM', 'smtpdup:uncertain', id) == 0 then
  return 0
end
redis.call('HDEL', 'smtpdup:covered', id)
local _, now = clock()
for i = 2, #ARGV, 2 do
  redis.call('SADD', 'smtpdup:lists', ARGV[i])
  redis.call('ZADD', 'smtpdup:pending:' .. ARGV[i], now, id)
  if ARGV[i + 1] ~= '' then
    redis.call('HSET', 'smtpdup:own:' .. ARGV[i], id, ARGV[i + 1])
  end
end
if #ARGV == 1 then
  local names, whole = destinations()
  if not is_listed(names, id) then forget_body(id, whole) end
end
return 1
