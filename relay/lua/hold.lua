-- ARGV: id, digest, seconds to hold.
if redis.call('ZREM', 'smtpdup:staged', ARGV[1]) == 0 then
  return 0
end
local time = redis.call('TIME')
redis.call('ZADD', 'smtpdup:uncertain', time[1] + tonumber(ARGV[3]), ARGV[1])
if ARGV[2] ~= '' then
  redis.call('HSET', 'smtpdup:twins', ARGV[2], ARGV[1])
end
return 1
