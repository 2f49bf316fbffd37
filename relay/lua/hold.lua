-- ARGV: for each message: id, digest, seconds to hold.
local time = redis.call('TIME')
local count = 0
for i = 1, #ARGV, 3 do
  if redis.call('ZREM', 'smtpdup:staged', ARGV[i]) == 1 then
    redis.call('ZADD', 'smtpdup:uncertain', time[1] + tonumber(ARGV[i + 2]), ARGV[i])
    if ARGV[i + 1] ~= '' then
      redis.call('HSET', 'smtpdup:twins', ARGV[i + 1], ARGV[i])
    end
    count = count + 1
  end
end
return count
